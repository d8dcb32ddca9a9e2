"""What messages are made of."""

from __future__ import annotations

import argparse
import doctest
from pathlib import Path

import pytest

from vision_mamba import text


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(text)
    assert result.attempted == 4 and result.failed == 0


def test_a_list_that_is_short_enough_is_whole() -> None:
    assert text.shortened("abcde") == "a, b, c, d, e" and text.shortened([]) == ""


def test_where_nothing_can_be_written_is_said_at_once(tmp_path: Path) -> None:
    assert text.destination(str(tmp_path / "new" / "file.json")).endswith("file.json")
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new" / "file.json").exists()
    (tmp_path / "file").write_text("")
    for wrong, why in ((tmp_path / "new", "Is a directory"), (tmp_path / "file" / "x", "File exists")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{wrong} cannot be written: {why}"):
            text.destination(str(wrong))
