"""Which images make up which batch, as a function of (seed, epoch, process): a run enters an epoch at any batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import BatchSampler, Sampler

from vision_mamba.train.errors import ConfigError
from vision_mamba.train.options import Config


class Key(NamedTuple):
    """An image of a batch; `size` is the number of the image size that the batch has."""

    epoch: int
    batch: int
    image: int
    size: int = 0


class Shuffled(Sampler[int]):
    """One process' share of the images, in an order that is a function of (seed, epoch).

    The processes' batches of the same number hold the images that one process with as large a batch would take.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.length, self.seed, self.rank, self.processes = length, seed, rank, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.processes

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        yield from order[self.rank :: self.processes][: len(self)].tolist()


class Repeated(RepeatAugSampler):
    """timm's sampler of repeated augmentation, in orders that the seed of a run settles."""

    def __init__(self, length: int, seed: int, repeats: float, rank: int, processes: int) -> None:
        super().__init__(range(length), num_replicas=processes, rank=rank, num_repeats=repeats)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys; none is incomplete. `at` sets where the next pass begins."""

    def __init__(self, order: Shuffled | Repeated, batches: BatchSampler | ScheduledBatchSampler) -> None:
        self.order, self.batches = order, batches
        self.epoch = self.batch = 0

    def at(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        # Sizes are drawn by the epoch itself, so that progressive schedules know how far the run has come.
        (self.batches if isinstance(self.batches, ScheduledBatchSampler) else self.order).set_epoch(self.epoch)
        for number, chosen in itertools.islice(enumerate(iter(self.batches)), self.batch, None):
            pairs: list[Any] = [item if isinstance(item, tuple) else (item, 0) for item in chosen]  # type: ignore[attr-defined]
            yield [Key(self.epoch, number, image, size) for image, size in pairs]


def epoch_batches(config: Config, length: int, rank: int = 0, processes: int = 1) -> EpochBatches:
    """The batches of one process of a run.

    Raises: ConfigError if the options on changing sizes contradict each other.
    """
    order: Shuffled | Repeated = Shuffled(length, config.seed, rank, processes)
    if config.aug_repeats:
        order = Repeated(length, config.seed, config.aug_repeats, rank, processes)
    if config.train_img_sizes is None:
        return EpochBatches(order, BatchSampler(order, config.batch_size, drop_last=True))
    progressive = config.train_size_schedule == "progressive"
    try:
        scheduled = ScheduledBatchSampler(
            order,
            batch_sizes=config.train_batch_sizes or [config.batch_size] * len(config.train_img_sizes),
            choice_weights=config.train_size_probs,
            seed=config.seed,
            num_batches=config.train_batches_per_epoch,
            choice_schedule=config.train_size_schedule,
            schedule_epochs=config.epochs if progressive else None,
            schedule_spread=config.train_size_schedule_spread,
            schedule_random_mix=config.train_size_random_mix,
        )
    except ValueError as error:
        raise ConfigError(f"--train-img-sizes, --train-batch-sizes, --train-size-probs: {error}") from error
    if len(scheduled.batch_sizes) != len(config.train_img_sizes):
        sizes, given = len(config.train_img_sizes), len(scheduled.batch_sizes)
        raise ConfigError(f"--train-batch-sizes must be as many as --train-img-sizes, {sizes}, got {given}.")
    return EpochBatches(order, scheduled)


def images_before(batch: int, epoch: int, config: Config, length: int, processes: int) -> int:
    """Images that all processes together see in an epoch before a batch."""
    return sum(itertools.islice(_together(epoch, config, length, processes), batch))


def batch_after(images: int, epoch: int, config: Config, length: int, processes: int) -> int:
    """The batch of an epoch before which all processes together see at most so many images."""
    seen = itertools.accumulate(_together(epoch, config, length, processes))
    return sum(1 for _ in itertools.takewhile(lambda total: total <= images, seen))


def _together(epoch: int, config: Config, length: int, processes: int) -> Iterator[int]:
    """How many images all processes together have in each batch of an epoch."""
    batches = epoch_batches(config, length, 0, processes)
    batches.at(epoch, 0)
    return (processes * len(batch) for batch in batches)
