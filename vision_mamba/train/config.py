"""Reading the options of a run: a YAML file of flat keys, overridden by flags of the same names, each value checked."""

from __future__ import annotations

import argparse
import os
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from vision_mamba.text import nearest
from vision_mamba.train.errors import ConfigError
from vision_mamba.train.options import FIELDS, Config

_HINTS = typing.get_type_hints(Config)


def _kind(name: str) -> tuple[Any, bool]:
    """The type of an option and whether it may be none: (float, True) of `float | None`."""
    members = typing.get_args(_HINTS[name]) if isinstance(_HINTS[name], types.UnionType) else (_HINTS[name],)
    return members[0], type(None) in members


def _several(name: str) -> bool:
    """Whether an option takes several words."""
    return typing.get_origin(_kind(name)[0]) in (tuple, dict)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)  # YAML reads 1e-3 as text


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise TypeError
    return int(value)


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return check


def _each(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple(check(item) for item in (value if isinstance(value, (list, tuple)) else [value]))


_CHECKS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    bool: ("true or false", _exactly(bool)),
    int: ("a whole number", _whole),
    float: ("a number", _number),
    str: ("text", _exactly(str)),
    tuple[float, ...]: ("a list of numbers", _each(_number)),
    tuple[int, ...]: ("a list of whole numbers", _each(_whole)),
    tuple[str, ...]: ("a list of names", _each(_exactly(str))),
    dict[str, Any]: ("a mapping such as {img_size: 32}", _exactly(dict)),
}


def _checked(name: str, value: Any, where: str) -> Any:
    """The value of an option in its proper type.

    Raises: ConfigError naming the place, the rule and the value.
    """
    kind, optional = _kind(name)
    rule = FIELDS[name].metadata
    if value is None and optional:
        return None
    wanted, check = _CHECKS[kind]
    try:
        checked = check(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where} must be {wanted}, got {value!r}.") from None
    low, high = rule["low"], rule["high"]
    if (low is not None and checked < low) or (high is not None and checked > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{where} must be {limits}, got {value!r}.")
    if rule["length"] is not None and len(checked) != rule["length"]:
        raise ConfigError(f"{where} must be {rule['length']} numbers, got {value!r}.")
    named = rule["choices"] is not None and not (rule["prefixes"] and checked.startswith(rule["prefixes"]))
    if named and checked not in rule["choices"]():
        known = rule["choices"]()
        listed = f" Known: {', '.join((*known, *(f'{start}NAME' for start in rule['prefixes'])))}."
        listed = listed if len(known) < 12 else ""
        raise ConfigError(
            f"{where} is {checked!r}, which is unknown; did you mean {nearest(checked, known)!r}?{listed}"
        )
    return checked


def _name_like(name: str) -> str:
    """The option that `name` was probably meant to be."""
    names = {alias: field for field, info in FIELDS.items() for alias in (field, *info.metadata["also"])}
    return names[nearest(name.strip("-").replace("-", "_"), names)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, checked.

    Raises: ConfigError with file and line for a key that is unknown or given twice and a value of the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"config {path} must be lines of 'key: value', got a {root.tag.rsplit(':', 1)[-1]}.")
    values: dict[str, Any] = {}
    for key_node, value_node in root.value:
        name, where = key_node.value, f"{path}:{key_node.start_mark.line + 1}"
        if name not in FIELDS:
            raise ConfigError(f"{where}: unknown key {name!r}; did you mean {_name_like(name)!r}?")
        if name in values:
            raise ConfigError(f"{where}: {name} is given twice; keep one of them.")
        raw = yaml.SafeLoader("").construct_object(value_node, deep=True)
        values[name] = _checked(name, raw, f"{where}: {name}")
    return values


def _from_text(name: str, text: Any) -> Any:
    """A flag's words as the value that YAML would hold."""
    kind, optional = _kind(name)
    if optional and text in ("none", ["none"]):
        return None
    if typing.get_origin(kind) is dict:
        pairs = [word.partition("=") for word in text]
        if not all(separator for _, separator, _ in pairs):
            raise ConfigError(f"--{name.replace('_', '-')} must be words like img_size=32, got {' '.join(text)!r}.")
        return {key: yaml.safe_load(value) for key, _, value in pairs}
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/train.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        allow_abbrev=False,
        description="Train an image classifier: any model of this package or of timm, on class folders or on digits.",
        epilog="""\
examples:
  tools/train.py --config configs/digits/vmamba.yaml                 the handwritten digits, a minute or two on a CPU
  tools/train.py --config configs/digits/vmamba.yaml --epochs 3 --seed 1 --experiment try
  tools/train.py --model vim_tiny_patch16_224 --data-dir my_images --batch-size 64 --amp
  tools/train.py --resume output/digits_vmamba/last.pth              continue an interrupted run, no other flag needed
  tools/train.py --config configs/digits/vmamba.yaml --resume auto   continue if there is something to continue
  torchrun --nproc-per-node 8 tools/train.py --config configs/in1k/vmamba_tiny.yaml --data-dir IMAGENET

my_images holds train/<class>/*.jpg and val/<class>/*.jpg. A flag wins over the config file; 'none' unsets an option.
A run writes output/<experiment>/: last.pth, previous.pth and best.pth (weights, optimizer, position), args.yaml,
summary.csv (one row an epoch), curves.png, train.log. Ctrl-C saves first and prints the command that continues.
exit status: 0 done, 1 failed, 2 wrong options, 130 Ctrl-C, 143 SIGTERM.""",
    )
    parser.add_argument(
        "--config", "-c", metavar="FILE", help="YAML file of the options below, one 'key: value' a line"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in FIELDS.items():
        rule = field.metadata
        kind, _ = _kind(name)
        default = getattr(Config, name, None)
        shown = "" if default in (None, (), "") or kind is bool else f" [{_shown(default)}]"
        arguments: dict[str, Any] = {"help": rule["help"].replace("%", "%%") + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            arguments |= {"action": argparse.BooleanOptionalAction}
        else:
            arguments |= {"metavar": _METAVARS.get(kind, "X")}
        if _several(name):
            arguments |= {"nargs": "+"}
        if rule["bare"] is not None:
            arguments |= {"nargs": "?", "const": rule["bare"]}
        group = groups.setdefault(rule["section"], parser.add_argument_group(rule["section"]))
        group.add_argument(f"--{name.replace('_', '-')}", **arguments)
    return parser


_METAVARS: dict[Any, str] = {
    dict[str, Any]: "K=V",
    int: "N",
    tuple[int, ...]: "N",
    str: "TEXT",
    tuple[str, ...]: "TEXT",
}


def _shown(default: Any) -> str:
    return " ".join(f"{item:.4g}" for item in default) if isinstance(default, tuple) else str(default)


def parse(argv: Sequence[str], saved_options: Callable[[str], dict[str, Any]]) -> Config:
    """The options of a run from its command line.

    A flag wins over the config file, that over the default. With --resume PATH and no --config the options are those
    saved in the checkpoint, and the run goes on in the folder where it lies.

    Args:
        argv: the words after the program's name.
        saved_options: path of a checkpoint -> the options that it was trained with.

    Raises: ConfigError; SystemExit after --help.
    """
    given, unknown = _parser().parse_known_args(argv)
    flags = vars(given)
    if unknown:
        word = unknown[0].partition("=")[0]
        raise ConfigError(
            f"unknown flag {word}; did you mean --{_name_like(word).replace('_', '-')}? --help lists all."
        )
    path = flags.pop("config", None)
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(path)
    elif flags.get("resume") not in (None, "auto"):
        values = from_saved(saved_options(flags["resume"]), flags["resume"])
        folder = Path(flags["resume"]).resolve().parent
        values |= {"output": os.path.relpath(folder.parent), "experiment": folder.name}
    for name, text in flags.items():
        values[name] = _checked(name, _from_text(name, text), f"--{name.replace('_', '-')}")
    return Config(**values)


def from_saved(options: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Options as a checkpoint holds them, checked like those of a file."""
    unknown = [name for name in options if name not in FIELDS]
    if unknown:
        raise ConfigError(f"{path}: the options saved in it have the unknown key {unknown[0]!r}; pass --config.")
    return {name: _checked(name, value, f"{path}: {name}") for name, value in options.items()}
