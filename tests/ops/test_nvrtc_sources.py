"""What every NVRTC that is named as enough must take, as far as it can be seen without each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vision_mamba.ops.backends.nvrtc import source_dir

KERNELS = sorted((source_dir() / "cuda").glob("*.cuh"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_no_lambda_takes_any_type(path: Path) -> None:
    """NVRTC 13.0 takes a lambda with `auto` among its arguments for a function of the host, and refuses it."""
    found = re.findall(r"\]\s*\([^)]*\bauto\b[^)]*\)", path.read_text(encoding="utf-8"))
    assert not found, f"{path.name}: {found}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_structs_have_names(path: Path) -> None:
    """NVRTC 12 does not find the members of a struct without a name in a union without one."""
    assert not re.search(r"\bstruct\s*\{[^{}]*\}\s*;", path.read_text(encoding="utf-8"))
