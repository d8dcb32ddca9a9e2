"""Weights and inputs by rule: the same on every machine, so that a fixture of a few logits checks a whole model.

Each tensor is filled from its name in the official checkpoint format. With phi the golden ratio's fraction and i the
flat index, u_i = frac((i + 1) phi + crc32(name) / 2^32) - 1/2, scaled by what kind of parameter the name says it is.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

PHI = 0.6180339887498949


def _by_route(*ends: str) -> tuple[str, ...]:
    """LocalVim's names, where a number for the route comes before what says the kind."""
    return tuple(end.replace("_0", f"_{route}") for end in ends for route in range(4))


# First matching end of the name wins: (ends, offset, factor); everything else is a matrix, scaled by its fan-in.
_RULES = (
    (("num_batches_tracked",), 0.0, 0.0),
    (("running_var",), 1.0, 0.5),
    (("running_mean",), 0.0, 0.1),
    (("A_logs", "A_log", "A_b_log", *_by_route("A_log_0")), 0.0, 1.0),
    (("Ds", ".D", ".D_b", "gamma_1", "gamma_2"), 1.0, 0.2),
    (("dt_projs_bias", "dt_bias", "dt_proj.bias", "dt_proj_b.bias", *_by_route("dt_proj_0.bias")), -2.0, 1.0),
    (("bias",), 0.0, 0.2),
)


def fill(name: str, like: Tensor) -> Tensor:
    """The tensor that the rule gives for an official parameter name, in float32, shaped like `like`."""
    index = np.arange(1, like.numel() + 1, dtype=np.float64)
    u = (index * PHI + zlib.crc32(name.encode()) / 2**32) % 1.0 - 0.5
    for ends, offset, factor in _RULES:
        if name.endswith(ends):
            return _tensor(offset + factor * u, like)
    if like.dim() == 1:
        return _tensor(1 + 0.2 * u, like)
    last = name.endswith(("x_proj_weight", "dt_projs_weight"))
    fan = like.shape[-1] if last else like.numel() // like.shape[0]
    return _tensor(2 * 3**0.5 * u / fan**0.5, like)


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).reshape(like.shape).float()


def fill_state_dict(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict, every parameter perturbed, from one with the right names and shapes."""
    return {name: fill(name, tensor) for name, tensor in shapes.items()}


def image(*shape: int) -> Tensor:
    """The input that goes with the weights: 2 frac((j + 1) phi) - 1 over the flat index j, float32."""
    index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64)
    return torch.from_numpy(2 * ((index * PHI) % 1.0) - 1).reshape(shape).float()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values in sorted order: two machines agree on the weights before on the logits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().float().contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
