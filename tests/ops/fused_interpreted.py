"""The kernels beside the scans in Triton's interpreter; test_fused.py runs this file."""

from __future__ import annotations

import pytest
import torch

from tests.ops.fused_cases import CASES, check


@pytest.mark.parametrize("name", CASES)
def test_equals_plain(name: str) -> None:
    torch.manual_seed(0)
    check(CASES[name](), "cpu")
