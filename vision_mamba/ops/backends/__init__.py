"""The implementations of the scan, registered in order of preference."""

from __future__ import annotations

import torch

from vision_mamba.ops import reference, registry
from vision_mamba.ops.backends import cpu, cuda, eager, triton
from vision_mamba.ops.call import ScanCall


def _anywhere(device: torch.device) -> None:
    return None


def _anything(call: ScanCall) -> None:
    return None


registry.register(cuda.BACKEND)
registry.register(triton.BACKEND)
registry.register(cpu.BACKEND)
registry.register(registry.Backend("eager", _anywhere, _anything, eager.forward, fast=False))
registry.register(registry.Backend("reference", _anywhere, _anything, reference.forward, fast=False, automatic=False))
