"""The C++ kernel of csrc/cpu, called through its plain C interface.

The library is built with the package where a compiler is found and opened on first use. It holds one copy of the kernel
for each instruction set ("level") and runs the best that the processor has; VISION_MAMBA_CPU_LEVEL names a lesser one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.registry import Backend

LEVEL_VARIABLE = "VISION_MAMBA_CPU_LEVEL"

_ABI = 1  # VISION_MAMBA_ABI of csrc/params.h, whose structs the two classes below repeat
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_REINSTALL = "reinstall the package, `pip install --force-reinstall --no-deps .` in its checkout."


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch", "token", "route", "column", "type")),
    ]


class _ScanParams(ctypes.Structure):
    _sizes = ("batch", "tokens", "steps", "routes", "channels", "states", "rank")
    _flags = ("shared_x", "merge", "softplus", "threads", "level")
    _inputs = ("A", "D", "dt_weight", "dt_bias", "initial_state", "last_state", "saved")
    _gradients = ("dlast", "dA", "dD", "ddt_weight", "ddt_bias", "dinitial_state")
    _fields_ = [
        *((name, c_int64) for name in _sizes + _flags),
        *((name, _Tokens) for name in ("x", "dt", "B", "C", "y")),
        *((name, c_void_p) for name in ("indices", *_inputs)),
        *((name, _Tokens) for name in ("dy", "dx", "ddt", "dB", "dC")),
        *((name, c_void_p) for name in _gradients),
    ]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    package = Path(__file__).resolve().parents[2]
    found = [path for suffix in EXTENSION_SUFFIXES if (path := package / f"_cpu{suffix}").is_file()]
    if not found:
        if sys.platform == "win32":
            return "the C++ kernel is not built on Windows; plain torch takes its place, as with backend='eager'."
        return (
            f"there is no C++ kernel (_cpu*.so) in {package}: it was not installed from here, or could not be built, "
            "mostly for want of a C++ compiler, as `pip install -v` tells; install one (g++ or clang++) and "
            f"{_REINSTALL}"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        library.vision_mamba_cpu_abi.restype = c_int64
        abi = library.vision_mamba_cpu_abi()
    except (OSError, AttributeError) as error:
        return f"the C++ kernel in {found[0]} cannot be opened ({error}); {_REINSTALL}"
    if abi != _ABI * 4096 + ctypes.sizeof(_ScanParams):
        return f"the C++ kernel in {found[0]} was built from another version of the sources; {_REINSTALL}"
    library.vision_mamba_cpu_tile.restype = c_int64
    library.vision_mamba_cpu_level.argtypes, library.vision_mamba_cpu_level.restype = [c_int64], c_char_p
    library.vision_mamba_cpu_supports.argtypes, library.vision_mamba_cpu_supports.restype = [c_int64], c_int
    for function in (library.vision_mamba_cpu_forward, library.vision_mamba_cpu_backward):
        function.argtypes, function.restype = [POINTER(_ScanParams)], c_int
    return library


@functools.cache
def levels() -> dict[str, int]:
    """Instruction sets that the library has and the processor supports -> their number, best first; {} without one."""
    library = _load()
    if isinstance(library, str):
        return {}
    found: dict[str, int] = {}
    number = 0
    while (name := library.vision_mamba_cpu_level(number)) is not None:
        if library.vision_mamba_cpu_supports(number):
            found[name.decode()] = number
        number += 1
    return found


def _unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU alone, and the tensors are on {device.type}."
    library = _load()
    if isinstance(library, str):
        return library
    level = os.environ.get(LEVEL_VARIABLE)
    if level and level not in levels():
        return (
            f"{LEVEL_VARIABLE} is {level!r}, but this machine has {', '.join(levels())}; unset it or name one of these."
        )
    return None


def _refuses(call: ScanCall) -> str | None:
    if call.x.dtype == torch.float64:
        return "it computes in float32 and the tensors are float64; convert them, or use 'eager' or 'reference'."
    return None


def _tokens(tensor: Tensor | None, per_route: bool = True) -> _Tokens:
    """A tensor (B, L, K, X), or (B, L, X) when it has no routes, as the kernel sees it."""
    if tensor is None:
        return _Tokens()
    batch, token, *route, column = tensor.stride()
    return _Tokens(tensor.data_ptr(), batch, token, *(route or [0]), column, _TYPES[tensor.dtype])


def _plain(tensor: Tensor | None) -> Tensor | None:
    """A small tensor in the form the kernel wants: contiguous float32."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_WEIGHTS = ("A", "D", "dt_weight", "dt_bias", "initial_state")


def _run(function: str, call: ScanCall, weights: dict[str, Tensor | None], **others: Tensor | _Tokens | None) -> None:
    """Fill the struct and call the kernel. The caller keeps every tensor alive meanwhile."""
    library = _load()
    assert not isinstance(library, str)
    indices = None if call.indices is None else call.indices.contiguous()
    level = os.environ.get(LEVEL_VARIABLE) or next(iter(levels()))
    params = _ScanParams(
        call.batch, call.tokens, call.steps, call.routes, call.channels, call.states, call.rank,
        call.shared_x, call.merge, call.dt_softplus, torch.get_num_threads(), levels()[level],
        x=_tokens(call.x), dt=_tokens(call.dt), B=_tokens(call.B), C=_tokens(call.C), indices=_pointer(indices),
        **{name: _pointer(tensor) for name, tensor in weights.items()},
        **{name: _pointer(value) if isinstance(value, Tensor) else value for name, value in others.items()},
    )  # fmt: skip
    if getattr(library, f"vision_mamba_cpu_{function}")(byref(params)):
        raise MemoryError(f"cross_selective_scan: backend 'cpu' found no memory for its {function} pass.")


def _forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, last = call.new_output(), call.new_last_state()
    saved = _new_saved(call) if save else call.x.new_empty(0)
    weights = {name: _plain(getattr(call, name)) for name in _WEIGHTS}
    kept = saved if saved.numel() else None
    _run("forward", call, weights, y=_tokens(y), last_state=last if call.return_last_state else None, saved=kept)
    return y, last, saved


def _backward(call: ScanCall, saved: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    weights = {name: _plain(getattr(call, name)) for name in _WEIGHTS}
    grads = {name: None if (t := getattr(call, name)) is None else torch.empty_like(t) for name in GRADIENTS}
    # The sums over a batch and over time come in float32, contiguous, and are rounded to their argument's type once.
    sums = {name: None if (t := weights[name]) is None else torch.empty_like(t) for name in _WEIGHTS}
    dlast = _plain(dlast)
    _run(
        "backward", call, weights, saved=saved, dy=_tokens(dy), dlast=dlast,
        **{f"d{name}": _tokens(grads[name]) for name in ("x", "dt", "B", "C")},
        **{f"d{name}": total for name, total in sums.items()},
    )  # fmt: skip
    for name, total in sums.items():
        grad = grads[name]
        if grad is not None and total is not None:
            grad.copy_(total)
    return tuple(grads[name] for name in GRADIENTS)


def _new_saved(call: ScanCall) -> Tensor:
    library = _load()
    assert not isinstance(library, str)
    tile = library.vision_mamba_cpu_tile()
    tiles = (call.steps + tile - 1) // tile - 1
    size = call.batch * call.routes * tiles * call.states * call.channels
    return call.x.new_empty(size, dtype=torch.float32)


BACKEND = Backend("cpu", _unavailable, _refuses, _forward, _backward, _new_saved)
