"""The CUDA C++ kernels of csrc/cuda as a backend of the scan."""

from __future__ import annotations

import torch

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import gpu
from vision_mamba.ops.backends.backward_cuda import backward
from vision_mamba.ops.backends.forward_cuda import forward, new_saved, prepare
from vision_mamba.ops.call import ScanCall
from vision_mamba.ops.registry import Backend


def _refuses(call: ScanCall) -> str | None:
    if call.x.dtype == torch.float64:
        return "float64 is computed by 'eager' and 'reference' alone; convert with .float()."
    if call.routes * call.channels * call.states >= 2**29:
        return "the states of one item of the batch have over 2 GiB; scan fewer channels at a time."
    return None


BACKEND = Backend(
    "cuda",
    gpu.unavailable,
    _refuses,
    forward,
    backward,
    new_saved,
    prepare=prepare,
    keeps="lean" if kernels.LEAN else "",
)
