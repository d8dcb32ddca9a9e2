"""Batches of images of unequal sizes, in an order that a run can leave and re-enter anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from vision_mamba.detection.coco import CocoSet, Sample
from vision_mamba.train.errors import DataError
from vision_mamba.train.loader import worker_init
from vision_mamba.train.parallel import World

Key = tuple[int, int, int]


class GroupedBatches(Sampler[list[Key]]):
    """Batches of keys (epoch, batch, number) in an order that is a function of (seed, epoch), a share for each process.

    Wide images go with wide ones and high with high, which saves padding; what is left of either fills the last
    batches, and none is incomplete. `at` sets where the next pass begins.

    Args:
        wide: of each image, whether it is wider than high.
    """

    def __init__(self, wide: Sequence[bool], batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.wide, self.batch_size, self.seed = np.asarray(wide), batch_size, seed
        self.rank, self.processes = rank, processes
        self.epoch = self.batch = 0

    def at(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        return len(self.wide) // self.batch_size // self.processes

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """The batches of all processes together."""
        random = np.random.default_rng((self.seed, epoch))
        order, size = random.permutation(len(self.wide)), self.batch_size
        kinds = [order[self.wide[order] == kind] for kind in (True, False)]
        whole = [len(kind) // size * size for kind in kinds]
        rest = np.concatenate([kind[count:] for kind, count in zip(kinds, whole, strict=True)])
        parts = [*(kind[:count] for kind, count in zip(kinds, whole, strict=True)), rest[: len(rest) // size * size]]
        batches = np.concatenate(parts).reshape(-1, size)
        return random.permutation(batches).tolist()

    def __iter__(self) -> Iterator[list[Key]]:
        batches = self.of_epoch(self.epoch)
        for batch in range(self.batch, len(self)):
            place = batch * self.processes + self.rank
            yield [(self.epoch, place, number) for number in batches[place]]


def together(samples: Sequence[Sample]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Lists of images and of targets; they are of any sizes, so nothing is stacked."""
    return [image for image, _ in samples], [target for _, target in samples]


def training_loader(images: CocoSet, batch_size: int, seed: int, workers: int, world: World) -> DataLoader:
    """Augmented batches for this process.

    Raises: DataError if there are too few images for one step.
    """
    batches = GroupedBatches([images.aspect(i) for i in range(len(images))], batch_size, seed, world.rank, world.size)
    if not len(batches):
        raise DataError(f"{len(images):,} images make no step of {world.size} x {batch_size}; lower --batch-size.")
    images.seed = seed
    return _loader(images, workers, world, batch_sampler=batches)


def held_out_loader(images: CocoSet, batch_size: int, workers: int, world: World) -> DataLoader:
    """This process's share of the images, each once, in order."""
    mine = range(world.rank, len(images), world.size)
    return _loader(images, workers, world, sampler=mine, batch_size=batch_size)


def _loader(images: CocoSet, workers: int, world: World, **order: Any) -> DataLoader:
    return DataLoader(
        images,
        **order,
        num_workers=workers,
        collate_fn=together,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,
    )
