"""The options of a detection run, each with its default and its help, from a YAML file and from flags."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vision_mamba.detection.model import DETECTORS
from vision_mamba.text import nearest
from vision_mamba.train.errors import ConfigError


def _option(section: str, default: Any, help: str, choices: Sequence[str] | None = None, low: float = 0) -> Any:
    return dataclasses.field(
        default=default, metadata={"section": section, "help": help, "choices": choices, "low": low}
    )


_data = functools.partial(_option, "data")
_model = functools.partial(_option, "model")
_optim = functools.partial(_option, "optimizer")
_sched = functools.partial(_option, "schedule")
_augment = functools.partial(_option, "sizes and augmentation")
_run = functools.partial(_option, "run")


@dataclass(frozen=True)
class Config:
    """Every option of a detection run; names are those of tools/train.py where that has the option too."""

    data_dir: str | None = _data(None, "where annotations/instances_<split>.json and the folders <split>/ are")
    train_split: str = _data("train2017", "name of the split to train on")
    val_split: str = _data("val2017", "name of the split held out")
    workers: int = _data(2, "processes that load images, for each device; 0 loads in the training process")
    skip_bad: bool = _data(False, "leave bad images and annotations out and list them in the log, instead of stopping")
    keep_empty: bool = _data(False, "also train on images on which there is no object")

    model: str = _model("vmamba_tiny_s1l8", "backbone: a registered name, of this package or of timm")
    model_kwargs: dict[str, Any] | None = _model(None, "arguments of its constructor, as in norm_eps=1e-6")  # noqa: RUF009
    pretrained: bool = _model(False, "begin from the backbone's published weights")
    initial_checkpoint: str | None = _model(None, "begin from the backbone's weights in this file, of a classifier")
    drop_path: float | None = _model(None, "stochastic depth rate")
    detector: str = _model("mask_rcnn", "head", choices=tuple(DETECTORS))
    detector_kwargs: dict[str, Any] | None = _model(None, "further arguments of torchvision's detector")  # noqa: RUF009
    strides: tuple[int, ...] | None = _model(None, "reductions of the maps to detect on (the detector's own)", low=1)
    fpn_channels: int = _model(256, "channels of the feature pyramid", low=1)
    head_channels: int = _model(1024, "hidden width of the box head of Faster and Mask R-CNN", low=1)
    anchor_scale: float | None = _model(None, "side of a level's smallest anchor over its stride (the detector's own)")
    tap_norm: bool = _model(True, "a layer norm on every map that is taken from the backbone, as published")

    opt: str = _optim("adamw", "any optimizer of timm")
    lr: float = _optim(1e-4, "learning rate after the warm-up, for all devices together")
    weight_decay: float = _optim(0.05, "not applied to biases, norms and what the backbone exempts")
    clip_grad: float | None = _optim(None, "limit of the gradient's norm (none)")

    epochs: int = _sched(12, "passes over the training images", low=1)
    batch_size: int = _sched(2, "images a step, for each device", low=1)
    sched: str = _sched("multistep", "how the learning rate falls", choices=("multistep", "cosine"))
    decay_milestones: tuple[float, ...] = _sched((8, 11), "multistep: epochs at which the learning rate falls")
    decay_rate: float = _sched(0.1, "multistep: factor of a fall")
    warmup_steps: int = _sched(1000, "steps in which the learning rate rises")
    warmup_factor: float = _sched(1e-3, "learning rate at the very start, over lr")

    min_size: tuple[int, ...] = _augment((800,), "shorter side of an image; in training one of these by chance", low=1)
    max_size: int = _augment(1333, "limit of the longer side", low=1)
    hflip: float = _augment(0.5, "probability of mirroring left to right")
    crop_size: tuple[int, ...] | None = _augment(
        None, "least and greatest side of a random crop of every other image, before it is resized (none)", low=1
    )
    crop_min_size: tuple[int, ...] = _augment((400, 500, 600), "shorter side of an image before that crop", low=1)

    device: str | None = _run(None, "cpu, cuda, mps (the accelerator if there is one)")
    amp: bool = _run(False, "mixed precision: multiplications in bfloat16, weights and scan states in float32")
    seed: int = _run(42, "of weights, order and augmentation")
    output: str = _run("output", "folder of all runs")
    experiment: str | None = _run(None, "folder of this run under output (model and detector)")
    overwrite: bool = _run(False, "replace a run that lies in that folder")
    resume: str | None = _run(None, "continue from this checkpoint, or 'auto': from the run's last one if it has any")
    recovery_interval: int = _run(0, "also save every so many steps; 0 saves after each epoch only")
    log_interval: int = _run(50, "steps between two lines of the log where no terminal shows a bar", low=1)
    eval_interval: int = _run(1, "epochs between two evaluations; the last is always evaluated", low=1)
    samples: int = _run(8, "held-out images in the picture of truth and detections, samples.png")
    record: str | None = _run(None, "append the result, with where it comes from, to this .jsonl file")

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / (self.experiment or f"{self.model}_{self.detector}".replace("/", "_"))

    def plain(self) -> dict[str, Any]:
        """The options as YAML and checkpoints hold them. How the run began is left out."""
        options = dataclasses.asdict(self) | {"resume": None, "overwrite": False}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


FIELDS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(Config)}
_HINTS = typing.get_type_hints(Config)


def _kind(name: str) -> tuple[type, type, bool]:
    """Of an option: its type, that of its items, and whether it may be none. (tuple, int, True) of ints or None."""
    members = typing.get_args(_HINTS[name]) if isinstance(_HINTS[name], types.UnionType) else (_HINTS[name],)
    kind = typing.get_origin(members[0]) or members[0]
    item = typing.get_args(members[0])[0] if kind is tuple else kind
    return kind, item, type(None) in members


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}.")


def _reader(name: str) -> Callable[[str], Any]:
    """Text -> a value of the option's kind within its limits."""
    _, item, optional = _kind(name)
    low = FIELDS[name].metadata["low"]
    wanted = {int: "a whole number", float: "a number", str: "text", dict: "a word like depth=3"}[item]

    def read(text: str) -> Any:
        if optional and text == "none":
            return None
        try:
            value = item(text) if item is not dict else _pair(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None
        if item in (int, float) and not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    return read


def _pair(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError
    return key, yaml.safe_load(value)


def parser() -> argparse.ArgumentParser:
    """The flags, one an option; what is not given is absent from the result."""
    made = _Parser(
        prog="tools/train_detection.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        allow_abbrev=False,
        description="Train a detector on a backbone of this package or of timm, on data in the format of COCO.",
        epilog="""\
examples:
  tools/make_digits_coco.py --out output/digits_coco
  tools/train_detection.py --config configs/digits/mask_rcnn.yaml --data-dir output/digits_coco
  torchrun --nproc-per-node 8 tools/train_detection.py --config configs/coco/vmamba_tiny_maskrcnn_1x.yaml \\
      --data-dir coco --initial-checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth
  tools/train_detection.py --resume output/digits_mask_rcnn/last.pth       continue an interrupted run

A flag wins over the config file; 'none' unsets an option. A run writes output/<experiment>/: last.pth and best.pth,
args.yaml, summary.csv (one row an evaluation), samples.png, train.log. Ctrl-C saves first.
exit status: 0 done, 1 failed, 2 wrong options, 130 Ctrl-C, 143 SIGTERM.""",
    )
    made.add_argument("--config", "-c", metavar="FILE", help="YAML file of the options below, one 'key: value' a line")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in FIELDS.items():
        kind, _, _ = _kind(name)
        rule = field.metadata
        shown = "" if field.default is None or kind is bool else f" [{_shown(field.default)}]"
        arguments: dict[str, Any] = {"help": rule["help"].replace("%", "%%") + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            arguments |= {"action": argparse.BooleanOptionalAction}
        else:
            arguments |= {"type": _reader(name), "metavar": "K=V" if kind is dict else name.rpartition("_")[2].upper()}
            if rule["choices"] is not None:
                arguments |= {"choices": rule["choices"]}
                del arguments["metavar"]
        if kind in (tuple, dict):
            arguments |= {"nargs": "+"}
        group = groups.setdefault(rule["section"], made.add_argument_group(rule["section"]))
        group.add_argument(_flag(name), **arguments)
    return made


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _finished(given: dict[str, Any]) -> dict[str, Any]:
    """Lists of words as the tuples and dicts that they stand for."""
    for name, value in given.items():
        kind, _, _ = _kind(name)
        if kind in (tuple, dict) and value is not None:
            given[name] = None if value == [None] else kind(value)
    return given


def _words(options: dict[str, Any], where: str) -> list[str]:
    """Options as words of a command line, so that files are held to the same rules as flags."""
    words = []
    for name, value in options.items():
        if name not in FIELDS:
            raise ConfigError(f"{where}: unknown key {name!r}; did you mean {nearest(str(name), FIELDS)!r}?")
        if _kind(name)[0] is bool:
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {name} must be true or false, got {value!r}.")
            words.append(_flag(name) if value else _flag(f"no_{name}"))
            continue
        if isinstance(value, dict):
            items = [f"{key}={json.dumps(item)}" for key, item in value.items()]  # JSON is YAML
        else:
            items = [_text(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        words += [_flag(name), *items]
    return words


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, checked.

    Raises: ConfigError with the file for a key that is unknown and a value of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {path} must be lines of 'key: value', got {type(content).__name__}.")
    return from_saved(content, f"config {path}")


def from_saved(options: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Options as a file or a checkpoint holds them, held to the rules of the flags."""
    words = _words(options, str(where))
    try:
        given = vars(parser().parse_args(words))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    given.pop("config")
    return _finished(given)


def parse(argv: Sequence[str], saved_options: Callable[[str], dict[str, Any]]) -> Config:
    """The options of a run from its command line.

    A flag wins over the config file, that over the default. With --resume PATH and no --config the options are those
    saved in the checkpoint, and the run goes on in the folder where it lies.

    Args:
        argv: the words after the program's name.
        saved_options: path of a checkpoint -> the options that it was trained with.

    Raises: ConfigError; SystemExit after --help.
    """
    given, unknown = parser().parse_known_args(list(argv))
    if unknown:
        word = unknown[0].partition("=")[0]
        raise ConfigError(
            f"unknown flag {word}; did you mean {_flag(nearest(word.strip('-').replace('-', '_'), FIELDS))}? "
            "--help lists all."
        )
    flags = vars(given)
    path = flags.pop("config", None)
    flags = _finished(flags)
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(path)
    elif flags.get("resume") not in (None, "auto"):
        values = from_saved(saved_options(flags["resume"]), flags["resume"])
        folder = Path(flags["resume"]).resolve().parent
        values |= {"output": os.path.relpath(folder.parent), "experiment": folder.name}
    config = Config(**(values | flags))
    if config.crop_size is not None and len(config.crop_size) != 2:
        raise ConfigError(f"--crop-size must be two numbers, least and greatest, got {_shown(config.crop_size)}.")
    return config
