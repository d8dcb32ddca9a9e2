"""The C++ kernel of csrc/cpu, called through its plain C interface."""

from __future__ import annotations

import torch

from vision_mamba.ops.call import ScanCall
from vision_mamba.ops.registry import Backend


def _unavailable(device: torch.device) -> str | None:
    return "under construction."


def _forward(call: ScanCall, save: bool):
    raise AssertionError


BACKEND = Backend("cpu", _unavailable, lambda call: None, _forward)
