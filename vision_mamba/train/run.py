"""A training run from its options to its result: data, model, loaders, and where to begin."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.layers import convert_sync_batchnorm
from timm.utils import random_seed

import vision_mamba
from vision_mamba.train import checkpoint
from vision_mamba.train import model as models
from vision_mamba.train.bad_images import BadImages, unreadable, without_unreadable
from vision_mamba.train.checkpoint import LAST, PREVIOUS
from vision_mamba.train.datasets import Images, image_sets
from vision_mamba.train.engine import Position, Trainer
from vision_mamba.train.errors import ConfigError
from vision_mamba.train.guards import ImageGuard
from vision_mamba.train.images import ImageSet
from vision_mamba.train.journal import Journal
from vision_mamba.train.learner import Learner
from vision_mamba.train.loader import evaluation_feed, training_feed
from vision_mamba.train.options import NEEDED, READER, Config
from vision_mamba.train.parallel import World, local_rank, rank_by_environment, world_on
from vision_mamba.train.progress import Progress
from vision_mamba.train.sampler import batch_after, images_before
from vision_mamba.train.seeds import deterministic

_log = logging.getLogger("vision_mamba.train")


def prepare(config: Config) -> Path | None:
    """Make the run's folder, and find the checkpoint to continue from.

    Returns: the checkpoint, or None to begin afresh.
    Raises: ConfigError if a run lies there that nobody said to continue or to replace.
    """
    run_dir = config.run_dir
    exists = (run_dir / LAST).exists() or (run_dir / PREVIOUS).exists()
    if config.resume == "auto":
        begin_from = run_dir / LAST if exists else None
    else:
        begin_from = Path(config.resume) if config.resume is not None else None
    elsewhere = begin_from is None or begin_from.resolve().parent != run_dir.resolve()
    if exists and elsewhere and not config.overwrite and not config.dry_run:
        raise ConfigError(
            f"{run_dir} holds a run already; continue it with --resume auto, keep both with another "
            "--experiment NAME, or replace it with --overwrite."
        )
    if rank_by_environment() == 0 and not config.dry_run:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output: {run_dir} cannot be made: {error.strerror}.") from error
        if not os.access(run_dir, os.W_OK):
            raise ConfigError(f"--output: {run_dir} cannot be written to.")
    return begin_from


def train(config: Config, begin_from: Path | None, progress: Progress) -> Position:
    """Train a model, from the start or from a checkpoint, together with the processes that were started beside this.

    Args:
        config: the options; their `run_dir` exists.
        begin_from: a checkpoint of such a run, or None.

    Returns: where it ended, with the held-out accuracy; after a dry run, where it would begin.
    Raises: TrainError for anything that the user can mend; Interrupted after SIGINT or SIGTERM.
    """
    models.register(config.device_modules)
    models.check_name(config.model)
    device = models.device(config.device, local_rank())
    with deterministic(config.deterministic), world_on(device) as world:
        trainer = _trainer(config, world, progress)
        if begin_from is not None:
            if config.resume == "auto":
                begin_from = world.told(checkpoint.newest(config.run_dir) if world.primary else None)
            assert begin_from is not None
            _resume(trainer, begin_from)
        if config.dry_run:
            _step_on_noise(trainer)
            return trainer.position
        if world.primary:
            checkpoint.write(config.run_dir / "args.yaml", yaml.safe_dump(config.plain(), sort_keys=False).encode())
        return trainer.fit(progress)


def _trainer(config: Config, world: World, progress: Progress) -> Trainer:
    """All that trains, at the start of a run."""
    sizes = config.train_batch_sizes or (config.batch_size,)
    if config.mixes and any(size % 2 for size in sizes):
        raise ConfigError(f"--batch-size must be even for --mixup and --cutmix, got {config.batch_size}.")
    for name, needed in NEEDED.items():
        if getattr(config, name) is not None and getattr(config, needed) is None:
            flag, other = (f"--{option.replace('_', '-')}" for option in (name, needed))
            raise ConfigError(f"{flag} means nothing without {other}; give that too, or neither.")
    mode = "L" if (config.in_chans or (config.model_kwargs or {}).get("in_chans")) == 1 else "RGB"
    train_set, held_out, classes = image_sets(config, mode)
    if config.num_classes is not None and config.num_classes < len(classes):
        raise ConfigError(f"--num-classes {config.num_classes} is less than the {len(classes)} classes of the data.")
    random_seed(config.seed)
    model = models.create(config, len(classes)).to(world.device)
    if config.sync_bn and world.size > 1:
        model = convert_sync_batchnorm(model)
    data_config = models.data_config(model, config.plain())
    if config.dataset in ("folder", "") and config.check_images:
        train_set, held_out = (_checked(images, config, world, progress) for images in (train_set, held_out))
    bad = [BadImages(), BadImages()]
    for images, told in zip((train_set, held_out), bad, strict=True):
        if isinstance(images, ImageSet):
            images.bad = told
    training = training_feed(train_set, data_config, config, world)
    evaluating = evaluation_feed(
        held_out, data_config, config.validation_batch_size or config.batch_size, config.workers, world
    )
    teacher = models.teacher(config, model)
    learner = Learner(config, model, world, len(training), data_config, teacher)
    extras: dict[str, Any] = {"classes": classes, "data_config": data_config, "images": len(train_set)}
    journal = Journal(config, world.primary and not config.dry_run)
    processes = f" in {world.size} processes" if world.size > 1 else ""
    _log.info(
        "%s: %.2f M parameters on %s%s; %d images to train on, %d held out, %d classes, %s px; %d steps an epoch of %d "
        "images; learning rate %.3g; seed %d; into %s",
        config.model, sum(p.numel() for p in model.parameters()) / 1e6, world.device, processes, len(train_set),
        len(held_out), len(classes), "x".join(map(str, data_config["input_size"][1:])), learner.updates,
        config.batch_size * config.grad_accum_steps * world.size, learner.optimizer.defaults["lr"], config.seed,
        config.run_dir,
    )  # fmt: skip
    if config.sched != "none" and not config.warmup_prefix and config.warmup_epochs >= config.epochs:
        _log.warning(
            "the learning rate rises through all of --epochs %d and does not reach --lr, for --warmup-epochs is %g; "
            "lower that", config.epochs, config.warmup_epochs,
        )  # fmt: skip
    _log.info("vision_mamba %s, timm %s, torch %s", vision_mamba.__version__, timm.__version__, torch.__version__)
    return Trainer(learner, training, evaluating, ImageGuard(config.skip_bad_images, *bad), journal, extras)


def _checked(images: Images, config: Config, world: World, progress: Progress) -> Images:
    """The images that can be decoded, in the way that the options say; each process tries its share of them."""
    assert isinstance(images, ImageSet)
    share = range(world.rank, len(images), world.size)
    with progress.bar("checking images", len(share)) as bar:
        found = unreadable(images.only(share), os.cpu_count() or 1, lambda: bar.advance(1))
    reasons = world.together({share[index]: reason for index, reason in found.items()})
    return without_unreadable(images, reasons, config.skip_bad_images, _log.warning)


def _resume(trainer: Trainer, path: Path) -> None:
    """Put a trainer where a checkpoint stands, and say what differs."""
    content = checkpoint.read(path)
    extras, position = trainer.extras, trainer.position
    classes = checkpoint.entry(content, "classes", path)
    if classes != extras["classes"]:
        raise ConfigError(f"{path} was trained on the classes {classes}, the data has {extras['classes']}.")
    trainer.restore(content, path)
    position = trainer.position
    saved = checkpoint.entry(content, "args", path)
    now = trainer.config.plain()
    for name, was in saved.items():
        if now.get(name) != was and name not in ("output", "experiment", "overwrite"):
            _log.warning("--%s was %s so far, is %s from here on", name.replace("_", "-"), was, now.get(name))
    if (images := checkpoint.entry(content, "images", path)) != extras["images"]:
        _log.warning("the data had %d images so far, has %d from here on", images, extras["images"])
    _go_on_at_the_same_image(trainer, Config(**READER.from_saved(saved, str(path))), images, content["processes"])
    where = f"after epoch {position.epoch}" + (f" and {position.batch} batches" if position.batch else "")
    _log.info("%s %s: %s", "finished" if trainer.done else "continuing", where, path)


def _go_on_at_the_same_image(trainer: Trainer, saved: Config, images: int, processes: int) -> None:
    """Enter an epoch after as many images as were seen of it, if batches or processes have changed.

    Args:
        saved, images, processes: options, number of images and of processes so far.
    """
    position, now = trainer.position, (trainer.config, trainer.extras["images"], trainer.world.size)
    seen = images_before(position.batch, position.epoch, saved, images, processes)
    if seen == images_before(position.batch, position.epoch, *now):
        return
    batch = batch_after(seen, position.epoch, *now)
    _log.warning(
        "%d images of the epoch were seen in %d batches of %d processes; going on at batch %d of now",
        seen, position.batch, processes, batch,
    )  # fmt: skip
    position.batch, position.trained, position.loss_sum = batch, 0, 0.0


def _step_on_noise(trainer: Trainer) -> None:
    """One step on random images, to see that everything fits together."""
    learner, batch = trainer.learner, trainer.config.batch_size
    learner.task.train()
    images = torch.rand(batch, *trainer.extras["data_config"]["input_size"], device=trainer.world.device)
    targets = torch.randint(len(trainer.extras["classes"]), (batch,), device=trainer.world.device)
    loss, norm = learner.gradients([(images, targets)] * trainer.config.grad_accum_steps, 0, 0).tolist()
    learner.apply(0, 1)
    _log.info(
        "dry run: one step on random images has loss %.4f and gradient norm %.4g; nothing was written", loss, norm
    )
