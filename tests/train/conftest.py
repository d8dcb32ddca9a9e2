from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import runs


@pytest.fixture
def drawn(tmp_path: Path, one_thread: None) -> Path:
    """A folder with images to train on; training there takes one thread, so that results are the same everywhere."""
    runs.draw(tmp_path / "images")
    return tmp_path
