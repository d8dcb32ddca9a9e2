"""docs/insight.md names pictures that exist, and commands that the tool knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tools import visualize

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "insight.md").read_text()
COMMANDS = re.findall(r"^python tools/visualize.py (.*)$", TEXT, re.MULTILINE)


def test_every_picture_is_there_and_made_by_a_command_of_the_page() -> None:
    shown = re.findall(r"^!\[.+\]\((.+)\)$", TEXT, re.MULTILINE)
    assert [f"docs/{name}" for name in shown] == [command.split()[-1] for command in COMMANDS]
    for name in shown:
        assert (DOCS / name).stat().st_size < 500_000
        with Image.open(DOCS / name) as picture:
            assert picture.width > 300


def test_there_is_a_command_for_everything_that_can_be_shown() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"order", *visualize.MODEL_COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    for name in ("draw_order", *(draw.__name__ for draw, _, _ in visualize.MODEL_COMMANDS.values())):
        monkeypatch.setattr(visualize, name, seen.append)
    rest = {name: (seen.append, *others) for name, (_, *others) in visualize.MODEL_COMMANDS.items()}
    monkeypatch.setattr(visualize, "MODEL_COMMANDS", rest)
    assert visualize.main(command.split()) == 0 and len(seen) == 1
