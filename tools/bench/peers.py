"""Published scans, where they can be imported: adapters to one signature, each in the classic layout.

A peer gets (u, delta, A, B, C, D, delta_bias) as in `vision_mamba.ops.selective_scan`, softplus on, one sequence per
route and already in the order of the route: the copies that its own model makes for that are not held against it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("bench")

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def _find(paths: tuple[Path, ...], file: str) -> types.ModuleType:
    """Import a file of a checkout that --peer-path names, or of one in the folder that it names."""
    folders = [folder for path in paths for folder in (path, *path.glob("*/"))]
    for place in (folder / file for folder in folders):
        if place.is_file():
            specification = importlib.util.spec_from_file_location(f"peer_{place.stem}", place)
            assert specification is not None and specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what they were written for
                specification.loader.exec_module(module)
            return module
    raise ImportError(f"no {file} under --peer-path {', '.join(map(str, paths)) or '(none given)'}")


def _mamba_mini(function: str, chunk: int, paths: tuple[Path, ...]) -> Scan:
    """MzeroMiko/mamba-mini: chunks in closed form, dividing by cumulated decays."""
    module = _find(paths, "test_selective_scan_easy.py")
    scan = getattr(module, function)

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
        return scan(u, delta, A, B, C, D, delta_bias, True, chunksize=chunk)

    return run


def _mamba_py(paths: tuple[Path, ...]) -> Scan:
    """alxndrTL/mamba.py: a Blelloch scan of materialised (B, L, D, N) tensors, which knows one group."""
    pscan = _find(paths, "mambapy/pscan.py").pscan

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
        groups, states = B.shape[1:3]
        x, dt = (t.unflatten(1, (groups, -1)).movedim(-1, 1) for t in (u, delta))  # (B, L, G, D)
        dt = F.softplus(dt + delta_bias.view(groups, -1)).unsqueeze(-1)
        decay = torch.exp(dt * A.view(groups, -1, states))
        weights = B.movedim(-1, 1).unsqueeze(-2)  # (B, L, G, 1, N)
        h = pscan(decay.flatten(2, 3), (dt * weights * x.unsqueeze(-1)).flatten(2, 3)).unflatten(2, (groups, -1))
        y = (h @ C.movedim(-1, 1).unsqueeze(-1)).squeeze(-1) + D.view(groups, -1) * x
        return y.movedim(1, -1).flatten(1, 2)

    return run


def _mamba_ssm(paths: tuple[Path, ...]) -> Scan:
    """state-spaces/mamba: the CUDA kernel that the Mamba papers measure."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
        return scan(u, delta, A, B, C, D, None, delta_bias, True)

    return run


def _vmamba_oflex(paths: tuple[Path, ...]) -> Scan:
    """VMamba's own CUDA kernel."""
    extension = importlib.import_module("selective_scan_cuda_oflex")

    class OFlex(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
        ) -> Tensor:
            out, x, *_ = extension.fwd(u, delta, A, B, C, D, bias, True, 1, True)
            ctx.save_for_backward(u, delta, A, B, C, D, bias, x)
            return out

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
            u, delta, A, B, C, D, bias, x = ctx.saved_tensors
            return tuple(extension.bwd(u, delta, A, B, C, D, bias, dy.contiguous(), x, True, 1)[:7])

    return OFlex.apply


_LOADERS: dict[str, Callable[[tuple[Path, ...]], Scan]] = {
    "mamba_mini_v1_chunk64": functools.partial(_mamba_mini, "selective_scan_easy", 64),
    "mamba_mini_v1_chunk16": functools.partial(_mamba_mini, "selective_scan_easy", 16),
    "mamba_mini_v1_own_backward_chunk16": functools.partial(_mamba_mini, "selective_scan_easy_fwdbwd", 16),
    "mamba_mini_v2_chunk16": functools.partial(_mamba_mini, "selective_scan_easyv2", 16),
    "mamba_mini_v3_chunk16": functools.partial(_mamba_mini, "selective_scan_easyv3", 16),
    "mamba_py_pscan": _mamba_py,
    "mamba_ssm": _mamba_ssm,
    "vmamba_oflex": _vmamba_oflex,
}


def load(paths: tuple[Path, ...]) -> dict[str, Scan]:
    """The peers that can be imported, by name; of the others the reason is logged."""
    found = {}
    for name, loader in _LOADERS.items():
        try:
            found[name] = loader(paths)
        except ImportError as error:
            log.info("skip peer %s: %s", name, error)
    return found
