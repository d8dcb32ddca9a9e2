"""What messages are made of."""

from __future__ import annotations

import doctest

from vision_mamba import text


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(text)
    assert result.attempted == 2 and result.failed == 0


def test_a_list_that_is_short_enough_is_whole() -> None:
    assert text.shortened("abcde") == "a, b, c, d, e" and text.shortened([]) == ""
