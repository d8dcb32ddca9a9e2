"""Loaders that a run can leave and re-enter at any batch.

The order of an epoch is a function of (seed, epoch) and the augmentation of a batch one of (seed, epoch, batch), so a
run that continues in the middle of an epoch sees exactly the batches that it would have seen, whatever the number of
loading processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Sampler, default_collate

from vision_mamba.train.errors import DataError
from vision_mamba.train.images import ImageSet


class EpochBatches(Sampler[list[tuple[int, int, int]]]):
    """Batches of keys (epoch, batch, index), in an order that is a function of (seed, epoch); none is incomplete.

    `at` sets where the next pass begins.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.batch = 0

    def at(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        for batch in range(self.batch, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, batch, index) for index in chosen]


def _worker_init(_: int) -> None:
    """Ctrl-C reaches the whole process group; only the training process may answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def create_loader(
    images: ImageSet,
    data_config: dict[str, Any],
    batch_size: int,
    workers: int,
    device: torch.device,
    augmentation: dict[str, Any] | None = None,
    seed: int = 0,
) -> DataLoader | PrefetchLoader:
    """Batches of normalised images and targets, on the device.

    Args:
        data_config: input_size, mean, std, interpolation, crop_pct, crop_mode, as timm resolves them for a model.
        augmentation: further arguments of timm's create_transform, which make it a loader to train with: shuffled,
            without an incomplete last batch. None loads everything once, in order.

    Raises: DataError if there are fewer images than a batch to train with.
    """
    training = augmentation is not None
    if training and len(images) < batch_size:
        raise DataError(f"{len(images):,} images make no batch of {batch_size}; lower --batch-size.")
    prefetch = device.type == "cuda"  # normalises on the device, while the step before is computed
    transform_config = {key: data_config[key] for key in ("input_size", "mean", "std", "interpolation")}
    if training:
        transform_config |= augmentation or {}
    else:
        transform_config |= {"crop_pct": data_config["crop_pct"], "crop_mode": data_config["crop_mode"]}
    images.transform = create_transform(**transform_config, is_training=training, use_prefetcher=prefetch)
    images.seed = seed
    order: dict[str, Any] = {"batch_size": batch_size}
    if training:
        order = {"batch_sampler": EpochBatches(len(images), batch_size, seed)}
    loader = DataLoader(
        images,
        **order,
        num_workers=workers,
        collate_fn=fast_collate if prefetch else default_collate,
        pin_memory=prefetch,
        worker_init_fn=_worker_init,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),  # else every pass would draw from the run's own generator
    )
    if not prefetch:
        return loader
    erasing = {key: transform_config.get(key, default) for key, default in (("re_prob", 0.0), ("re_mode", "const"))}
    channels = data_config["input_size"][0]
    return PrefetchLoader(
        loader, mean=data_config["mean"], std=data_config["std"], channels=channels, device=device, **erasing
    )
