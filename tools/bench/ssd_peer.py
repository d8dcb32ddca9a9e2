"""The peer of the state-space dual scan's benchmark: mamba_ssm's chunk scan, and what its autotuner chooses.

The autotuner compiles some 200 kernels for a width of heads and states, one after the other, before it times them.
Here processes beside each other fill Triton's cache first, each with a part of the candidates; what is chosen can be
kept in a file and taken from it, so that a later run on the same kind of GPU compiles and times the chosen ones alone.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_mamba.ops.ssd_call import SsdCall

NAME = "mamba_ssm"
PARTS = 8  # in which the candidates are compiled


def load(path: Path, chunk: int) -> Callable[[SsdCall], Tensor]:
    """`mamba_chunk_scan_combined` of a checkout, which only needs its Triton files to import."""
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    for tuner in _tuners():
        tuner.do_bench = _trial

    def scan(call: SsdCall) -> Tensor:
        dt, B, C = (t.squeeze(2) for t in (call.dt, call.B, call.C))
        skip, bias = (None if t is None else t[0] for t in (call.D, call.dt_bias))
        return combined(call.x, dt, call.A[0], B, C, chunk_size=chunk, D=skip, dt_bias=bias, dt_softplus=True)

    return scan


def compile_part(part: int) -> None:
    """Let the autotuner take its next candidates from this part, and the first of them without timing any."""
    for tuner in _tuners():
        tuner.cache.clear()
        tuner.configs = _candidates(tuner)[part::PARTS] or tuner.configs[:1]
        tuner.do_bench = _once


def choices() -> list[list[Any]]:
    """[kernel, key, candidate] of every choice so far."""
    return [
        [tuner.base_fn.__name__, list(key), str(config)] for tuner in _tuners() for key, config in tuner.cache.items()
    ]


def choose(path: Path) -> None:
    """Take the choices that a file of `choices` holds."""
    tuners = {tuner.base_fn.__name__: tuner for tuner in _tuners()}
    for name, key, chosen in json.loads(path.read_text()):
        tuner = tuners[name]
        tuner.cache[tuple(key)] = next(config for config in _candidates(tuner) if str(config) == chosen)


def _tuners() -> Iterator[Any]:
    kind = importlib.import_module("triton.runtime.autotuner").Autotuner
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{NAME}.ops.triton.")]
    found = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, kind)}
    return iter(found.values())


def _candidates(tuner: Any) -> list[Any]:
    """All of them, whatever part it has been given before."""
    every: list[Any] = vars(tuner).setdefault("every", tuner.configs)
    return every


def _trial(launch: Callable[[], Any], quantiles: tuple[float, ...]) -> Any:
    """Shorter than the autotuner's own."""
    return importlib.import_module("triton.testing").do_bench(launch, warmup=2, rep=8, quantiles=quantiles)


def _once(launch: Callable[[], Any], quantiles: tuple[float, ...]) -> list[float]:
    launch()
    torch.cuda.synchronize()
    return [1.0] * 3
