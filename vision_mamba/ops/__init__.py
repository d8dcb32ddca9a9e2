"""Selective scans: public operators in front, backends behind one registration with torch.library."""

from vision_mamba.ops import autograd, backends
from vision_mamba.ops.conv import conv_along, conv_both_ways, conv_map, gated
from vision_mamba.ops.cross_selective_scan import cross_selective_scan
from vision_mamba.ops.norm import add_normed, normed
from vision_mamba.ops.registry import BackendError, available_backends, use_backend
from vision_mamba.ops.selective_scan import selective_scan
from vision_mamba.ops.ssd import ssd

__all__ = [
    "BackendError",
    "add_normed",
    "autograd",
    "available_backends",
    "backends",
    "conv_along",
    "conv_both_ways",
    "conv_map",
    "cross_selective_scan",
    "gated",
    "normed",
    "selective_scan",
    "ssd",
    "use_backend",
]
