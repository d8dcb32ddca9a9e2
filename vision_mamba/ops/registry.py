"""Which implementation of an operator runs a call: a list in order of preference, each able to refuse and say why."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("vision_mamba")


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why and which can."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Args:
        name: what ``backend=`` and ``use_backend`` call it.
        unavailable: device -> None if it can run there on this machine, else the reason with its remedy.
        refuses: call -> None if it can run this very call, else the reason. Asked only where it is available.
        forward: (call, save) -> (y, last_state, saved); `saved` is what backward wants kept, of no elements
            without `save`.
        backward: (call, saved, dy, dlast) -> a gradient or None for each argument that has one, like its argument
            (`torch.empty_like`); dy or dlast is None where the loss does not see it. None where plain autograd
            differentiates `forward`, as it does for implementations written in torch.
        new_saved: call -> the uninitialised tensor that `forward` fills when asked to save.
        fast: False for those one falls back to; choosing one of them is said aloud, once.
        automatic: False for one that runs when it is named alone.
        fast_on: types of devices where one that is not fast is the fastest way all the same.
        prepare: (call, save) -> `forward` for each call that differs from this one in values and addresses alone, given
            the addresses of its tensors; None for a call that is looked at anew each time.
        keeps: how it saves what backward wants, where a process decides that once.
    """

    name: str
    unavailable: Callable[[torch.device], str | None]
    refuses: Callable[[Any], str | None]
    forward: Callable[[Any, bool], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[Any, Tensor, Tensor | None, Tensor | None], tuple[Tensor | None, ...]] | None = None
    new_saved: Callable[[Any], Tensor] = lambda call: call.x.new_empty(0)
    fast: bool = True
    automatic: bool = True
    fast_on: tuple[str, ...] = ()
    prepare: Callable[[Any, bool], Callable[[list[int]], tuple[Tensor, Tensor, Tensor]] | None] | None = None
    keeps: str = ""


_forced: str | None = None
_announced: set[tuple[str, str, str]] = set()
_registries: dict[str, Registry] = {}


class Registry:
    """The implementations of one operator, in order of preference.

    Args:
        operator: its name, as in ``torch.ops.vision_mamba``.
        title: what the log calls it.
    """

    def __init__(self, operator: str, title: str) -> None:
        self.operator, self.title = operator, title
        self.backends: dict[str, Backend] = {}
        _registries[operator] = self

    def register(self, backend: Backend) -> None:
        """Append a backend; the order of registration is the order of preference."""
        if backend.name in self.backends:
            raise ValueError(f"registry.register: a backend named {backend.name!r} exists; choose another name.")
        self.backends[backend.name] = backend

    def names(self) -> tuple[str, ...]:
        return tuple(self.backends)

    def get(self, name: str) -> Backend:
        if name in self.backends:
            return self.backends[name]
        if any(name in other.backends for other in _registries.values()):
            raise BackendError(
                f"{self.operator}: backend {name!r} does not implement it; those that do are "
                f"{', '.join(self.backends)}."
            )
        near = difflib.get_close_matches(name, self.backends, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise BackendError(f"backend {name!r} is unknown, known are {', '.join(self.backends)}{hint}")

    def choose(self, call: Any, name: str | None) -> Backend:
        """The backend that runs the call: the named one, or else the first that accepts it.

        Raises: BackendError if the named one refuses; a named backend is obeyed or refused, never replaced.
        """
        name = name or _forced
        if name is not None:
            backend = self.get(name)
            reason = reason_against(backend, call)
            if reason is None:
                return backend
            accepting = [other.name for other in self.backends.values() if reason_against(other, call) is None]
            raise BackendError(
                f"{self.operator}: backend {name!r} refuses this call: {reason} "
                f"Backends that accept it: {', '.join(accepting) or 'none'}."
            )
        refusals: list[str] = []
        for backend in self.backends.values():
            if not backend.automatic:
                continue
            reason = reason_against(backend, call)
            if reason is None:
                _announce(self, backend, call.x.device, refusals)
                return backend
            refusals.append(f"{backend.name}: {reason}")
        raise BackendError(f"{self.operator}: no backend accepts this call. " + " ".join(refusals))


#: Those of the selective scans, and their functions by the names that the rest of the library calls.
scans = Registry("cross_selective_scan", "selective scan")
_backends = scans.backends
register, names, get, choose = scans.register, scans.names, scans.get, scans.choose


def available_backends(
    device: torch.device | str | None = None, operator: str = "cross_selective_scan"
) -> dict[str, str | None]:
    """Say of each backend whether it runs on a device of this machine.

    Args:
        device: the device to ask for; the default asks for the accelerator if there is one, else the CPU.
        operator: "cross_selective_scan", on which `selective_scan` stands too, or "ssd".

    Returns: name -> None if it runs, else the reason and the way to make it run; in order of preference.

    >>> available_backends("cpu")["reference"] is None
    True
    """
    if operator not in _registries:
        raise ValueError(
            f"available_backends: operator must be one of {', '.join(_registries)}, got {operator!r}; name the "
            f"operator as in torch.ops.vision_mamba."
        )
    if device is None:
        device = _accelerator()
    device = torch.device(device)
    return {name: backend.unavailable(device) for name, backend in _registries[operator].backends.items()}


def _accelerator() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    # By itself torch names what it was built for, whether or not there is one.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


class use_backend(contextlib.AbstractContextManager):
    """Run every operator on one backend: at once and for good as a call, until the block ends as a context manager.

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


def choices() -> list[tuple[str, str, str, str]]:
    """Operator, kind of device, name of a backend that runs there, and how it saves; of all that this machine has."""
    devices = {torch.device("cpu"), _accelerator()}
    return [
        (operator, device.type, backend.name, backend.keeps)
        for operator, device in itertools.product(_registries, sorted(devices, key=str))
        for backend in _registries[operator].backends.values()
        if backend.unavailable(device) is None
    ]


def forced() -> str | None:
    """The backend set by use_backend, if any."""
    return _forced


def reason_against(backend: Backend, call: Any) -> str | None:
    """None if the backend runs the call, else why not."""
    return backend.unavailable(call.x.device) or backend.refuses(call)


def _announce(registry: Registry, backend: Backend, device: torch.device, refusals: list[str]) -> None:
    """One log line per operator, backend and kind of device; a warning when it is a slow one."""
    key = (registry.operator, backend.name, device.type)
    if key in _announced:
        return
    _announced.add(key)
    if backend.fast or device.type in backend.fast_on:
        _log.info("%s on %s: backend %r", registry.title, device.type, backend.name)
    else:
        _log.warning(
            "%s on %s: backend %r, a slow one, since %s Run `python -m vision_mamba.doctor` for the fix.",
            registry.title,
            device.type,
            backend.name,
            " ".join(refusals) or "it is the only one.",
        )
