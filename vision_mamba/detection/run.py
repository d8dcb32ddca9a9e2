"""A detection run from its options to its result: data, detector, loaders, and where to begin."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml
from timm.utils import random_seed
from torch import nn

import vision_mamba
from vision_mamba.detection.coco import CocoSet, open_split
from vision_mamba.detection.engine import LAST, SUMMARY, Position, Trainer
from vision_mamba.detection.loader import held_out_loader, training_loader
from vision_mamba.detection.model import DETECTORS, create_detector
from vision_mamba.detection.options import READER, Config
from vision_mamba.detection.transforms import augmentation, preparation
from vision_mamba.train import checkpoint
from vision_mamba.train import model as models
from vision_mamba.train.errors import CheckpointError, ConfigError
from vision_mamba.train.parallel import World
from vision_mamba.train.progress import Progress

_log = logging.getLogger("vision_mamba.detection")


def prepare(config: Config) -> Path | None:
    """Make the run's folder, and find the checkpoint to continue from; the first process alone does this.

    Returns: the checkpoint, or None to begin afresh.
    Raises: ConfigError if a run lies there that nobody said to continue or to replace.
    """
    last = config.run_dir / LAST
    begin_from = None if config.resume is None else Path(config.resume)
    if config.resume == "auto":
        begin_from = last if last.exists() else None
    elsewhere = begin_from is None or begin_from.resolve().parent != last.resolve().parent
    if last.exists() and elsewhere and not config.overwrite:
        raise ConfigError(
            f"{config.run_dir} holds a run already; continue it with --resume auto, keep both with another "
            "--experiment NAME, or replace it with --overwrite."
        )
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if begin_from is None:
            (config.run_dir / SUMMARY).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {config.run_dir} cannot be made: {error.strerror}.") from error
    return begin_from


def train(config: Config, begin_from: Path | None, progress: Progress, world: World) -> Position:
    """Train a detector, from the start or from a checkpoint.

    Args:
        config: the options; their `run_dir` exists.
        begin_from: a checkpoint of such a run, or None.
        world: the processes that train together.

    Returns: where it ended, with the figures of the last evaluation.
    Raises: TrainError for anything that the user can mend; Interrupted after SIGINT or SIGTERM.
    """
    models.check_name(config.model)
    train_set, held_out = data(config)
    if train_set.names != held_out.names:
        raise ConfigError(
            f"the splits differ in their categories: {train_set.names} to train, {held_out.names} held out."
        )
    random_seed(config.seed)  # the same weights in every process
    detector = build(config, len(train_set.categories)).to(world.device)
    train_loader = training_loader(train_set, config.batch_size, config.seed, config.workers, world)
    eval_loader = held_out_loader(held_out, config.batch_size, config.workers, world)
    extras: dict[str, Any] = {"classes": train_set.names, "images": len(train_set)}
    trainer = Trainer(config, detector, train_loader, eval_loader, world, extras)
    if begin_from is not None:
        _resume(trainer, begin_from, extras)
    if world.primary:
        options = yaml.safe_dump(config.plain(), sort_keys=False)
        (config.run_dir / "args.yaml").write_text(options, encoding="utf-8")
    _log.info(
        "%s on %s: %.2f M parameters on %d x %s; %d images to train on, %d held out, %d categories; seed %d; into %s",
        config.detector, config.model, sum(p.numel() for p in detector.parameters()) / 1e6, world.size, world.device,
        len(train_set), len(held_out), len(train_set.names), config.seed, config.run_dir,
    )  # fmt: skip
    versions = (vision_mamba.__version__, timm.__version__, torchvision.__version__, torch.__version__)
    _log.info("vision_mamba %s, timm %s, torchvision %s, torch %s", *versions)
    return trainer.fit(progress)


def data(config: Config) -> tuple[CocoSet, CocoSet]:
    """The images to train on, augmented, and those held out."""
    masks = DETECTORS[config.detector].masks
    train_set = open_split(config.data_dir, config.train_split, masks, config.skip_bad, config.keep_empty)
    held_out = open_split(config.data_dir, config.val_split, masks, config.skip_bad)
    train_set.transform, held_out.transform = augmentation(config), preparation()
    return train_set, held_out


def build(config: Config, classes: int) -> nn.Module:
    """The detector of a run, its backbone with random, published or given weights.

    Raises: ConfigError for an argument that does not exist or fit; CheckpointError if given weights do not fit.
    """
    arguments: dict[str, Any] = {"pretrained": config.pretrained, **(config.model_kwargs or {})}
    if config.drop_path is not None:
        arguments["drop_path_rate"] = config.drop_path
    if config.initial_checkpoint is not None:
        checkpoint.weights(checkpoint.read(config.initial_checkpoint), config.initial_checkpoint)
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": config.initial_checkpoint}}
    try:
        return create_detector(
            config.detector, config.model, classes, config.strides, config.fpn_channels, config.head_channels,
            config.anchor_scale, config.tap_norm, config.min_size[-1], config.max_size, config.detector_kwargs,
            **arguments,
        )  # fmt: skip
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ConfigError(f"--model-kwargs: {error}.") from error
    except (ValueError, RuntimeError) as error:
        if config.initial_checkpoint is not None:
            raise CheckpointError(f"{config.initial_checkpoint} for {config.model}: {error}") from error
        if isinstance(error, RuntimeError):
            raise
        raise ConfigError(f"--model {config.model}, --detector {config.detector}: {error}") from error


def _resume(trainer: Trainer, path: Path, extras: dict[str, Any]) -> None:
    """Put a trainer where a checkpoint stands, and say what differs."""
    content = checkpoint.read(path)
    classes = checkpoint.entry(content, "classes", path)
    if classes != extras["classes"]:
        raise ConfigError(f"{path} was trained on the categories {classes}, the data has {extras['classes']}.")
    trainer.restore(content, path)
    for name, was in checkpoint.entry(content, "args", path).items():
        if (now := trainer.config.plain().get(name)) != was and name not in ("output", "experiment"):
            _log.warning("--%s was %s so far, is %s from here on", name.replace("_", "-"), was, now)
    position = trainer.position
    _log.info("%s after epoch %d and %d steps: %s", "finished" if trainer.done else "continuing",
              position.epoch, position.batch, path)  # fmt: skip


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, list[str]]:
    """Rebuild a trained detector from a checkpoint of tools/train_detection.py.

    Returns: the detector, in evaluation mode, and the names of its labels, which begin at 1.
    Raises: CheckpointError if the file is damaged or none of these.
    """
    content = checkpoint.read(path)
    options = checkpoint.entry(content, "args", path) | {"pretrained": False, "initial_checkpoint": None}
    config = Config(**READER.from_saved(options, path))
    names = checkpoint.entry(content, "classes", path)
    detector = build(config, len(names))
    checkpoint.load(detector, checkpoint.weights(content, path), path, config.model, content.get("arch"))
    return detector.to(torch.device(device)).eval(), list(names)
