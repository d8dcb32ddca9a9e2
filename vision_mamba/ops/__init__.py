"""Selective scans: public operators in front, backends behind one registration with torch.library."""

from vision_mamba.ops import autograd, backends
from vision_mamba.ops.cross_selective_scan import cross_selective_scan
from vision_mamba.ops.registry import BackendError, available_backends, use_backend
from vision_mamba.ops.selective_scan import selective_scan
from vision_mamba.ops.ssd import ssd

__all__ = [
    "BackendError",
    "autograd",
    "available_backends",
    "backends",
    "cross_selective_scan",
    "selective_scan",
    "ssd",
    "use_backend",
]
