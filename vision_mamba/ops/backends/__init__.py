"""The implementations of every operator, registered in order of preference."""

from __future__ import annotations

from typing import Any

import torch

from vision_mamba.ops import reference, registry, ssd_operator, ssd_reference
from vision_mamba.ops.backends import cpu, cuda, eager, ssd_cpu, ssd_eager, ssd_triton, triton


def _anywhere(device: torch.device) -> None:
    return None


def _anything(call: Any) -> None:
    return None


registry.register(cuda.BACKEND)
registry.register(triton.BACKEND)
registry.register(cpu.BACKEND)
registry.register(registry.Backend("eager", _anywhere, _anything, eager.forward, fast=False))
registry.register(registry.Backend("reference", _anywhere, _anything, reference.forward, fast=False, automatic=False))

ssd = ssd_operator.registry
ssd.register(ssd_triton.BACKEND)
ssd.register(ssd_cpu.BACKEND)
# On a CPU its two products are the fastest there is for a call without an order.
ssd.register(registry.Backend("eager", _anywhere, _anything, ssd_eager.forward, fast=False, fast_on=("cpu",)))
ssd.register(registry.Backend("reference", _anywhere, _anything, ssd_reference.forward, fast=False, automatic=False))
