"""The fields of a dataclass of options: what each says of its check, its flag and its help.

A subclass of `Options` lists the options of a run, each made by `option`; a `Rule` holds a value to what its field
says, whether it comes from a file, from a flag or from a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from vision_mamba.text import nearest
from vision_mamba.train.errors import ConfigError

_FEW = 12  # names are listed if they are fewer


def option(
    section: str,
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    length: int | None = None,
    choices: Callable[[], Sequence[str]] | None = None,
    prefixes: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    bare: Any = None,
    kept: bool = True,
    rising: bool = False,
) -> Any:
    """A field with what its check, its flag and its help need.

    Args:
        low, high: limits of a number, or of each of several. length: how many numbers. rising: the least of them first.
        choices, prefixes: the values that text may have, and beginnings of further ones.
        also: other names that people try. bare: the value of the flag without one.
        kept: whether a run that goes on later goes on with the value.
    """
    told: dict[str, Any] = dict(section=section, help=help, low=low, high=high, length=length, choices=choices)
    told |= dict(prefixes=prefixes, also=also, bare=bare, kept=kept, rising=rising)
    return dataclasses.field(default=default, metadata=told)


def one_of(*names: str) -> Callable[[], Sequence[str]]:
    return lambda: names


@dataclass(frozen=True)
class Options:
    """What the options of every run can do."""

    def plain(self) -> dict[str, Any]:
        """The options as YAML and checkpoints hold them. How the run began is left out."""
        values = dataclasses.asdict(self)
        values |= {field.name: field.default for field in dataclasses.fields(self) if not field.metadata["kept"]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _number(value: Any) -> float:
    number = float(value)  # YAML reads 1e-3 as text
    if isinstance(value, bool) or math.isnan(number):
        raise TypeError
    return number


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


#: Of the type of an option: how a wrong value is told what it must be, the check, and what --help calls the value.
_KINDS: dict[Any, tuple[str, Callable[[Any], Any], str | None]] = {
    bool: ("true or false", _exactly(bool), None),
    int: ("a whole number", _whole, "N"),
    float: ("a number", _number, "X"),
    str: ("text", _exactly(str), "TEXT"),
    tuple[float, ...]: ("a list of numbers", _each(_number), "X"),
    tuple[int, ...]: ("a list of whole numbers", _each(_whole), "N"),
    tuple[str, ...]: ("a list of names", _each(_exactly(str)), "TEXT"),
    dict[str, Any]: ("a mapping such as {img_size: 32}", _exactly(dict), "K=V"),
}


class _Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag, also where the flag itself begins with no-, as --no-aug does."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class Rule:
    """What a field of a Config says, its type resolved: kind float and optional of `float | None`."""

    def __init__(self, field: dataclasses.Field, hint: Any) -> None:
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        self.kind, self.optional = members[0], type(None) in members
        self.default, self.told = field.default, field.metadata
        self.flag = f"--{field.name.replace('_', '-')}"

    def checked(self, value: Any, where: str) -> Any:
        """The value in its proper type; 'none' is none.

        Raises: ConfigError naming the place, the rule and the value.
        """
        if self.optional and value in (None, "none", ["none"]):
            return None
        wanted, check, _ = _KINDS[self.kind]
        try:
            checked = check(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{where} must be {wanted}, got {value!r}.") from None
        low, high, length = (self.told[name] for name in ("low", "high", "length"))
        items = checked if isinstance(checked, tuple) else (checked,)
        if any((low is not None and item < low) or (high is not None and item > high) for item in items):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{where} must be {limits}, got {value!r}.")
        if length is not None and len(checked) != length:
            raise ConfigError(f"{where} must be {length} numbers, got {value!r}.")
        if self.told["rising"] and list(items) != sorted(items):
            raise ConfigError(f"{where} must have the least number first, got {value!r}.")
        self._check_name(checked, where)
        return checked

    def _check_name(self, value: Any, where: str) -> None:
        if self.told["choices"] is None or (self.told["prefixes"] and value.startswith(self.told["prefixes"])):
            return
        known = self.told["choices"]()
        if value not in known:
            listed = f" Known: {', '.join(self._names)}." if self._names else ""
            raise ConfigError(
                f"{where} is {value!r}, which is unknown; did you mean {nearest(value, known)!r}?{listed}"
            )

    @property
    def _names(self) -> list[str]:
        """The values that text may have, if they are few."""
        known = self.told["choices"]() if self.told["choices"] else ()
        names = [*known, *(f"{start}NAME" for start in self.told["prefixes"])]
        return [name or "''" for name in names] if len(known) < _FEW else []

    def from_words(self, words: Any) -> Any:
        """The words after the flag as the value that YAML would hold."""
        if typing.get_origin(self.kind) is not dict or words == ["none"]:
            return words
        pairs = [word.partition("=") for word in words]
        try:
            if all(separator for _, separator, _ in pairs):
                return {key: yaml.safe_load(value) for key, _, value in pairs}
        except yaml.YAMLError:
            pass
        raise ConfigError(f"{self.flag} must be words like img_size=32, got {' '.join(words)!r}.")

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Put the flag into a parser; what is not given is absent from the parser's result."""
        shown = "" if self.default in (None, (), "") or self.kind is bool else f" [{_shown(self.default)}]"
        arguments: dict[str, Any] = {"help": self.told["help"].replace("%", "%%") + shown}
        if self.kind is bool:
            arguments |= {"action": _Switch}
        else:
            arguments |= {"metavar": f"{{{','.join(self._names)}}}" if self._names else _KINDS[self.kind][2]}
        if typing.get_origin(self.kind) in (tuple, dict):
            arguments |= {"nargs": "+"}
        if self.told["bare"] is not None:
            arguments |= {"nargs": "?", "const": self.told["bare"]}
        group.add_argument(self.flag, default=argparse.SUPPRESS, **arguments)


def _shown(default: Any) -> str:
    items = default if isinstance(default, tuple) else (default,)
    return " ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in items)
