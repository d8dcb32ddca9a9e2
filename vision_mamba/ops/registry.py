"""Which implementation of the scan runs a call: a list in order of preference, each able to refuse and to say why."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_mamba.ops.call import ScanCall

_log = logging.getLogger("vision_mamba")


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why and which can."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the scan.

    Args:
        name: what ``backend=`` and ``use_backend`` call it.
        unavailable: device -> None if it can run there on this machine, else the reason with its remedy.
        refuses: call -> None if it can run this very call, else the reason. Asked only where it is available.
        forward: (call, save) -> (y, last_state, saved); `saved` is what backward wants kept, of no elements
            without `save`.
        backward: (call, saved, dy, dlast) -> a gradient or None for each of ``call.GRADIENTS``, like its argument
            (`torch.empty_like`); dy or dlast is None where the loss does not see it. None where plain autograd
            differentiates `forward`, as it does for implementations written in torch.
        new_saved: call -> the uninitialised tensor that `forward` fills when asked to save.
        fast: False for those one falls back to; choosing one of them is said aloud, once.
    """

    name: str
    unavailable: Callable[[torch.device], str | None]
    refuses: Callable[[ScanCall], str | None]
    forward: Callable[[ScanCall, bool], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[ScanCall, Tensor, Tensor | None, Tensor | None], tuple[Tensor | None, ...]] | None = None
    new_saved: Callable[[ScanCall], Tensor] = lambda call: call.x.new_empty(0)
    fast: bool = True
    automatic: bool = True  # False: only runs when named


_backends: dict[str, Backend] = {}
_forced: str | None = None
_announced: set[tuple[str, str]] = set()


def register(backend: Backend) -> None:
    """Append a backend; the order of registration is the order of preference."""
    if backend.name in _backends:
        raise ValueError(f"registry.register: a backend named {backend.name!r} exists; choose another name.")
    _backends[backend.name] = backend


def names() -> tuple[str, ...]:
    return tuple(_backends)


def get(name: str) -> Backend:
    if name not in _backends:
        near = difflib.get_close_matches(name, _backends, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise BackendError(f"backend {name!r} is unknown, known are {', '.join(_backends)}{hint}")
    return _backends[name]


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Say of each backend whether it runs on a device of this machine.

    Args:
        device: the device to ask for; the default asks for the accelerator if there is one, else the CPU.

    Returns: name -> None if it runs, else the reason and the way to make it run; in order of preference.

    >>> available_backends("cpu")["reference"] is None
    True
    """
    if device is None:
        # By itself it names what torch was built for, whether or not there is one.
        device = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or "cpu"
    device = torch.device(device)
    return {name: backend.unavailable(device) for name, backend in _backends.items()}


class use_backend(contextlib.ContextDecorator):
    """Run every scan on one backend: at once and for good as a call, until the block ends as a context manager.

    Args:
        name: a backend, or None to let the library choose again.

    Raises: BackendError if there is no such backend. A call that the backend refuses raises BackendError too.

    >>> with use_backend("reference"):
    ...     pass
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            get(name)
        self._before, _forced = _forced, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: Any) -> None:
        global _forced
        _forced = self._before


def forced() -> str | None:
    """The backend set by use_backend, if any."""
    return _forced


def reason_against(backend: Backend, call: ScanCall) -> str | None:
    """None if the backend runs the call, else why not."""
    return backend.unavailable(call.x.device) or backend.refuses(call)


def choose(call: ScanCall, name: str | None) -> Backend:
    """The backend that runs the call: the named one, or else the first that accepts it.

    Raises: BackendError if the named one refuses; a named backend is obeyed or refused, never replaced.
    """
    name = name or _forced
    if name is not None:
        backend = get(name)
        reason = reason_against(backend, call)
        if reason is None:
            return backend
        accepting = [other.name for other in _backends.values() if reason_against(other, call) is None]
        raise BackendError(
            f"cross_selective_scan: backend {name!r} refuses this call: {reason} "
            f"Backends that accept it: {', '.join(accepting) or 'none'}."
        )
    refusals: list[str] = []
    for backend in _backends.values():
        if not backend.automatic:
            continue
        reason = reason_against(backend, call)
        if reason is None:
            _announce(backend, call.x.device, refusals)
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise BackendError("cross_selective_scan: no backend accepts this call. " + " ".join(refusals))


def _announce(backend: Backend, device: torch.device, refusals: list[str]) -> None:
    """One log line per backend and kind of device; a warning when it is a slow one."""
    key = (backend.name, device.type)
    if key in _announced:
        return
    _announced.add(key)
    if backend.fast:
        _log.info("selective scan on %s: backend %r", device.type, backend.name)
    else:
        _log.warning(
            "selective scan on %s: backend %r, a slow one, since %s Run `python -m vision_mamba.doctor` for the fix.",
            device.type,
            backend.name,
            " ".join(refusals) or "it is the only one.",
        )
