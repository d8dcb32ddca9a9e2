"""A training run from its options to its result: data, model, loaders, and where to begin."""

from __future__ import annotations

import dataclasses
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.utils import random_seed

import vision_mamba
from vision_mamba.train import checkpoint
from vision_mamba.train import model as models
from vision_mamba.train.engine import LAST, Position, Trainer
from vision_mamba.train.errors import ConfigError, DataError
from vision_mamba.train.images import ImageSet, class_folders, digits, split_folder, unreadable, without_unreadable
from vision_mamba.train.loader import create_loader
from vision_mamba.train.options import Config
from vision_mamba.train.progress import Progress

_log = logging.getLogger("vision_mamba.train")


def prepare(config: Config) -> Path | None:
    """Make the run's folder, and find the checkpoint to continue from.

    Returns: the checkpoint, or None to begin afresh.
    Raises: ConfigError if a run lies there that nobody said to continue or to replace.
    """
    last = config.run_dir / LAST
    if config.resume == "auto":
        begin_from = last if last.exists() else None
    else:
        begin_from = Path(config.resume) if config.resume is not None else None
    if (
        last.exists()
        and not config.overwrite
        and (begin_from is None or begin_from.resolve().parent != last.resolve().parent)
    ):
        raise ConfigError(
            f"{config.run_dir} holds a run already; continue it with --resume auto, keep both with another "
            "--experiment NAME, or replace it with --overwrite."
        )
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {config.run_dir} cannot be made: {error.strerror}.") from error
    return begin_from


def train(config: Config, begin_from: Path | None, progress: Progress) -> Position:
    """Train a model, from the start or from a checkpoint.

    Args:
        config: the options; their `run_dir` exists.
        begin_from: a checkpoint of such a run, or None.

    Returns: where it ended, with the held-out accuracy.
    Raises: TrainError for anything that the user can mend; Interrupted after SIGINT or SIGTERM.
    """
    device = models.device(config.device)
    models.check_name(config.model)
    if config.batch_size % 2 and (config.mixup or config.cutmix):
        raise ConfigError(f"--batch-size must be even for --mixup and --cutmix, got {config.batch_size}.")
    mode = "L" if (config.in_chans or (config.model_kwargs or {}).get("in_chans")) == 1 else "RGB"
    train_set, eval_set = image_sets(config, mode)
    if config.num_classes is not None and config.num_classes < len(train_set.classes):
        raise ConfigError(
            f"--num-classes {config.num_classes} is less than the {len(train_set.classes)} classes of the data."
        )
    random_seed(config.seed)
    model = models.create(config, len(train_set.classes)).to(device)
    data_config = models.data_config(model, config.plain())
    if config.dataset == "folder" and config.check_images:
        train_set, eval_set = (_checked(images, config, progress) for images in (train_set, eval_set))
    loader = partial(create_loader, data_config=data_config, workers=config.workers, device=device, seed=config.seed)
    train_loader = loader(train_set, batch_size=config.batch_size, augmentation=augmentation(config))
    eval_loader = loader(eval_set, batch_size=config.validation_batch_size or config.batch_size)
    extras: dict[str, Any] = {"classes": list(train_set.classes), "data_config": data_config, "images": len(train_set)}
    trainer = Trainer(config, model, train_loader, eval_loader, device, extras)
    if begin_from is not None:
        _resume(trainer, begin_from, extras)
    (config.run_dir / "args.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False), encoding="utf-8")
    _log.info(
        "%s: %.2f M parameters on %s; %d images to train on, %d held out, %d classes, %s px; seed %d; into %s",
        config.model, sum(p.numel() for p in model.parameters()) / 1e6, device, len(train_set), len(eval_set),
        len(train_set.classes), "x".join(map(str, data_config["input_size"][1:])), config.seed, config.run_dir,
    )  # fmt: skip
    _log.info("vision_mamba %s, timm %s, torch %s", vision_mamba.__version__, timm.__version__, torch.__version__)
    try:
        return trainer.fit(progress)
    except DataError as error:  # an image went bad after the check, or there was none: name all of them
        trainer.save()
        _log.error("stopped at an unreadable image; the run up to there is in %s", config.run_dir / LAST)
        for images in (train_set, eval_set):
            _checked(images, dataclasses.replace(config, skip_unreadable=False), progress)
        raise error


def image_sets(config: Config, mode: str) -> tuple[ImageSet, ImageSet]:
    """The images to train on and those held out."""
    if config.dataset == "digits":
        return digits(False, mode), digits(True, mode)
    train_set = class_folders(split_folder(config.data_dir, config.train_split), mode)
    held_out = split_folder(config.data_dir, config.val_split)
    return train_set, class_folders(held_out, mode, train_set.classes)


def augmentation(config: Config) -> dict[str, Any]:
    """The options as arguments of timm's create_transform."""
    if config.no_aug:
        return {"no_aug": True}
    return {
        "scale": config.scale,
        "ratio": config.ratio,
        "hflip": config.hflip,
        "vflip": config.vflip,
        "color_jitter": config.color_jitter or None,
        "auto_augment": config.aa,
        "re_prob": config.reprob,
        "re_mode": config.remode,
        "interpolation": config.train_interpolation,
    }


def _checked(images: ImageSet, config: Config, progress: Progress) -> ImageSet:
    """The images that can be decoded, in the way that the options say."""
    with progress.bar("checking images", len(images)) as bar:
        reasons = unreadable(images, os.cpu_count() or 1, lambda: bar.advance(1))
    return without_unreadable(images, reasons, config.skip_unreadable, _log.warning)


def _resume(trainer: Trainer, path: Path, extras: dict[str, Any]) -> None:
    """Put a trainer where a checkpoint stands, and say what differs."""
    content = checkpoint.read(path)
    classes = checkpoint.entry(content, "classes", path)
    if classes != extras["classes"]:
        raise ConfigError(f"{path} was trained on the classes {classes}, the data has {extras['classes']}.")
    trainer.restore(content, path)
    for name, was in checkpoint.entry(content, "args", path).items():
        if (now := trainer.config.plain().get(name)) != was and name not in ("output", "experiment", "overwrite"):
            _log.warning("--%s was %s so far, is %s from here on", name.replace("_", "-"), was, now)
    if (images := checkpoint.entry(content, "images", path)) != extras["images"]:
        _log.warning("the data had %d images so far, has %d from here on", images, extras["images"])
    position = trainer.position
    where = f"after epoch {position.epoch}" + (f" and {position.batch} steps" if position.batch else "")
    _log.info("%s %s: %s", "finished" if trainer.done else "continuing", where, path)
