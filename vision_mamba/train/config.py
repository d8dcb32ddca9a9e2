"""Reading the options of a run: a YAML file of flat keys, overridden by flags of the same names, each value checked."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import yaml

from vision_mamba.text import nearest
from vision_mamba.train.errors import ConfigError
from vision_mamba.train.fields import Options, Rule


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}.")


C = TypeVar("C", bound=Options)


class Reader(Generic[C]):
    """Reads the options of a run from its command line.

    Args:
        config: the options; output, experiment and resume are among them.
        prog, description, epilog: what --help says around them.
    """

    def __init__(self, config: type[C], prog: str, description: str, epilog: str) -> None:
        hints = typing.get_type_hints(config)
        self.config = config
        self.rules = {field.name: Rule(field, hints[field.name]) for field in dataclasses.fields(config)}
        self._told = prog, description, epilog

    def parse(self, argv: Sequence[str], saved_options: Callable[[str], dict[str, Any]]) -> C:
        """The options of a run from its command line.

        A flag wins over the config file, that over the default. With --resume PATH and no --config the options are
        those saved in the checkpoint, and the run goes on in the folder where it lies.

        Args:
            argv: the words after the program's name.
            saved_options: path of a checkpoint -> the options that it was trained with.

        Raises: ConfigError; SystemExit after --help.
        """
        given, unknown = self._parser().parse_known_args(argv)
        flags = vars(given)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                raise ConfigError(f"{word!r} follows no flag that takes it; give words as --FLAG VALUE.")
            near = self.rules[self._name_like(word)].flag
            raise ConfigError(f"unknown flag {word}; did you mean {near}? --help lists all.")
        path = flags.pop("config")
        values: dict[str, Any] = {}
        if path is not None:
            values = self.read_yaml(path)
        elif flags.get("resume") not in (None, "none", "auto"):
            values = self.from_saved(saved_options(flags["resume"]), flags["resume"])
            folder = Path(flags["resume"]).resolve().parent
            values |= {"output": os.path.relpath(folder.parent), "experiment": folder.name}
        for name, words in flags.items():
            rule = self.rules[name]
            values[name] = rule.checked(rule.from_words(words), rule.flag)
        return self.config(**values)

    def read_yaml(self, path: str | Path) -> dict[str, Any]:
        """The options in a YAML file, checked.

        Raises: ConfigError with file and line for a key that is unknown or given twice and a value of the wrong type.
        """
        values: dict[str, Any] = {}
        for name, value, line in _entries(path):
            where = f"{path}:{line}"
            if name not in self.rules:
                raise ConfigError(f"{where}: unknown key {name!r}; did you mean {self._name_like(name)!r}?")
            if name in values:
                raise ConfigError(f"{where}: {name} is given twice; keep one of them.")
            values[name] = self.rules[name].checked(value, f"{where}: {name}")
        return values

    def from_saved(self, options: dict[str, Any], path: str | Path) -> dict[str, Any]:
        """Options as a checkpoint holds them, checked like those of a file."""
        unknown = [name for name in options if name not in self.rules]
        if unknown:
            raise ConfigError(f"{path}: the options saved in it have the unknown key {unknown[0]!r}; pass --config.")
        return {name: self.rules[name].checked(value, f"{path}: {name}") for name, value in options.items()}

    def _name_like(self, name: str) -> str:
        """The option that `name` was probably meant to be."""
        names = {alias: known for known, rule in self.rules.items() for alias in (known, *rule.told["also"])}
        return names[nearest(name.strip("-").replace("-", "_"), names)]

    def _parser(self) -> argparse.ArgumentParser:
        prog, description, epilog = self._told
        parser = _Parser(
            prog=prog,
            usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--config", "-c", metavar="FILE", help="YAML file of the options below, one 'key: value' a line"
        )
        groups: dict[str, argparse._ArgumentGroup] = {}
        for rule in self.rules.values():
            section = rule.told["section"]
            if section not in groups:
                groups[section] = parser.add_argument_group(section)
            rule.add_to(groups[section])
        return parser


def _entries(path: str | Path) -> list[tuple[str, Any, int]]:
    """The keys of a YAML file, their values and their lines."""
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"config {path} must be lines of 'key: value', got a {root.tag.rsplit(':', 1)[-1]}.")
        return [
            (str(key.value), loader.construct_object(value, deep=True), key.start_mark.line + 1)
            for key, value in root.value
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
