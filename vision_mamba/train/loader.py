"""Loaders that a run can leave and re-enter at any batch.

The order of an epoch is a function of (seed, epoch), the augmentation of a batch one of (seed, process, epoch, batch).
So a run that continues in the middle of an epoch sees exactly the batches that it would have seen, whatever the number
of loading processes. Streams can only be read from the start: there the batches that were seen are read again and
dropped, and the number of loading processes counts.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.dataset import IterableImageDataset
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import adapt_to_chs, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from vision_mamba.train.errors import ConfigError, DataError
from vision_mamba.train.images import ImageSet
from vision_mamba.train.options import Config
from vision_mamba.train.parallel import World
from vision_mamba.train.sampler import EpochBatches, epoch_batches


def _posterized(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Colours of so many bits, of 0 too, which RandAugment asks for now and then and Pillow refuses from 13 on."""
    return _posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


_posterize = auto_augment.posterize
auto_augment.NAME_TO_OP |= {name: _posterized for name, op in auto_augment.NAME_TO_OP.items() if op is _posterize}


class _Ahead:
    """A loader whose next pass may begin before anybody takes a batch of it."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self._begun: Iterator[Any] | None = None

    def begin(self) -> None:
        if self.loader.num_workers:
            self._begun = iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        return iter(self.loader) if begun is None else begun


class _Sent:
    """Batches of 8-bit images, copied to a GPU while it computes on the one before, and normalised there.

    timm's PrefetchLoader has the copy wait for all that the GPU was asked to do before; here it waits for nothing.
    """

    def __init__(self, batches: _Ahead, device: torch.device, data_config: dict[str, Any]) -> None:
        self.batches, self.device, self.beside = batches, device, torch.cuda.Stream(device)
        colours = [adapt_to_chs(data_config[key], data_config["input_size"][0]) for key in ("mean", "std")]
        self.mean, self.std = (
            torch.tensor([255 * value for value in each], device=device).view(1, -1, 1, 1) for each in colours
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        coming: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
        for images, targets in self.batches:
            with torch.cuda.stream(self.beside):
                sent = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
                before, coming = coming, (*sent, self.beside.record_event())
            if before is not None:
                yield self._arrived(*before)
        if coming is not None:
            yield self._arrived(*coming)

    def _arrived(self, images: Tensor, targets: Tensor, copied: torch.cuda.Event) -> tuple[Tensor, Tensor]:
        here = torch.cuda.current_stream(self.device)
        here.wait_event(copied)
        for each in (images, targets):
            each.record_stream(here)  # so that their memory is not used again before that is done with them
        return images.float().sub_(self.mean).div_(self.std), targets


class Feed:
    """Batches of normalised images and targets, on the device.

    Args:
        loader: of the batches; of 8-bit images if `data_config` is given, which are normalised on the device then.
        valid: of this process' images, those that no other process has too; None if that is not known.
    """

    def __init__(
        self, loader: DataLoader, device: torch.device, data_config: dict[str, Any] | None, valid: int | None = None
    ) -> None:
        self.loader, self.device, self.valid = loader, device, valid
        self._skip = 0
        self._ahead = _Ahead(loader)
        self.batches: Any = self._ahead
        if data_config is not None:
            self.batches = _Sent(self._ahead, device, data_config)

    def at(self, epoch: int, batch: int) -> None:
        """Where the next pass begins."""
        if isinstance(self.loader.batch_sampler, EpochBatches):
            self.loader.batch_sampler.at(epoch, batch)
            return
        self._skip = batch
        self.loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        assert self.loader.generator is not None
        self.loader.generator.manual_seed(epoch)  # of which the processes' own seeds are drawn

    def begin(self, epoch: int, batch: int) -> None:
        """Let the loading processes work on the pass from there on already, so that its first batch is ready."""
        self.at(epoch, batch)
        self._ahead.begin()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in itertools.islice(self.batches, self._skip, None):
            yield images.to(self.device), targets.to(self.device)


def worker_init(_: int) -> None:
    """Signals reach the whole process group; only the training process may answer the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))
    torch.set_num_threads(1)


def training_feed(
    images: ImageSet | IterableImageDataset, data_config: dict[str, Any], config: Config, world: World
) -> Feed:
    """Shuffled and augmented batches, none of them incomplete, of this process' share of the images.

    Raises: DataError if there are fewer images than a batch; ConfigError for an unknown policy of augmentation.
    """
    sides = config.train_img_sizes or (None,)
    sizes = [
        data_config["input_size"] if side is None else [data_config["input_size"][0], side, side] for side in sides
    ]
    if isinstance(images, IterableImageDataset):
        order: dict[str, Any] = {"batch_size": config.batch_size, "drop_last": True}
    else:
        images.seed = (config.seed, world.rank)
        order = {"batch_sampler": epoch_batches(config, len(images), world.rank, world.size)}
        if not len(order["batch_sampler"]):
            each = f", shared out over {world.size} processes," if world.size > 1 else ""
            raise DataError(f"{len(images):,} images{each} make no batch of {config.batch_size}; lower --batch-size.")
    try:
        return _feed(images, data_config, sizes, config.workers, world.device, order, True, **_augmentation(config))
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        if config.aa is None or config.no_aug:
            raise
        raise ConfigError(
            f"--aa {config.aa} is no policy that timm knows; examples: rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, 3a, "
            "original, v0."
        ) from error


def evaluation_feed(
    images: ImageSet | IterableImageDataset, data_config: dict[str, Any], batch_size: int, workers: int, world: World
) -> Feed:
    """Every image once, in order; of several processes, each has its share."""
    order: dict[str, Any] = {"batch_size": batch_size}
    valid = None
    if world.size > 1 and not isinstance(images, IterableImageDataset):
        sampler = OrderedDistributedSampler(images, num_replicas=world.size, rank=world.rank)
        order, valid = order | {"sampler": sampler}, sampler.num_valid_samples
    sizes = [data_config["input_size"]]
    crop = {"crop_pct": data_config["crop_pct"], "crop_mode": data_config["crop_mode"]}
    feed = _feed(images, data_config, sizes, workers, world.device, order, False, **crop)
    feed.valid = valid
    return feed


def _feed(
    images: ImageSet | IterableImageDataset,
    data_config: dict[str, Any],
    sizes: Sequence[Sequence[int]],
    workers: int,
    device: torch.device,
    order: dict[str, Any],
    training: bool,
    **options: Any,
) -> Feed:
    on_device = device.type == "cuda"
    options = {key: data_config[key] for key in ("mean", "std", "interpolation")} | options
    transforms: list[Callable] = [
        create_transform(tuple(size), **options, is_training=training, use_prefetcher=on_device)  # type: ignore[arg-type]
        for size in sizes
    ]
    stream = isinstance(images, IterableImageDataset)
    if isinstance(images, IterableImageDataset):
        images.transform = transforms[0]
        images.set_loader_cfg(num_workers=workers)
    else:
        images.transforms = transforms
    loader: DataLoader = DataLoader(
        images,
        **order,
        num_workers=workers,
        collate_fn=fast_collate if on_device else default_collate,
        pin_memory=on_device,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0 and not stream,  # a stream's processes learn of the epoch when they start
        generator=torch.Generator().manual_seed(0),  # else every pass would draw from the run's own generator
    )
    return Feed(loader, device, data_config if on_device else None)


def _augmentation(config: Config) -> dict[str, Any]:
    """The options as arguments of timm's create_transform; rectangles are erased on the device, by the step."""
    if config.no_aug:
        return {"no_aug": True}
    return {
        "train_crop_mode": config.train_crop_mode,
        "scale": config.scale,
        "ratio": config.ratio,
        "hflip": config.hflip,
        "vflip": config.vflip,
        "color_jitter": config.color_jitter or None,
        "color_jitter_prob": config.color_jitter_prob,
        "grayscale_prob": config.grayscale_prob or 0.0,
        "gaussian_blur_prob": config.gaussian_blur_prob or 0.0,
        "auto_augment": config.aa,
        "interpolation": config.train_interpolation,
    }
