"""Every check of the scan's arguments, with its sentence: where, rule, finding, way out. All backends rely on it."""

from __future__ import annotations

import weakref
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vision_mamba import constants
from vision_mamba.ops.call import ScanCall

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_STATES = 256


def _show(shape: object) -> str:
    return "(" + ", ".join(str(int(size)) for size in shape) + ")"  # type: ignore[attr-defined]


def require_shape(where: str, name: str, tensor: Tensor, letters: str, shape: tuple[int, ...], hint: str = "") -> None:
    """Raise ValueError unless tensor.shape is `shape`, whose sizes are called `letters`, e.g. "(batch, tokens)"."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{where}: {name} must be {letters} = {_show(shape)}, got {_show(tensor.shape)}{hint and '; ' + hint}."
        )


def require_dim(where: str, name: str, tensor: Tensor, letters: str, dims: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has one of the allowed numbers of dimensions."""
    if tensor.dim() not in dims:
        raise ValueError(f"{where}: {name} must be {letters}, got {tensor.dim()} dimensions: {_show(tensor.shape)}.")


def require_kind(where: str, tensors: dict[str, Tensor | None], leader: Tensor) -> None:
    """Raise ValueError unless all tensors are real floats on the leader's device, float64 together or not at all."""
    double = leader.dtype == torch.float64
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}.")
        if tensor.dtype.is_complex:
            raise ValueError(
                f"{where}: {name} must be float32, float16, bfloat16 or float64, got {_name(tensor.dtype)}; complex "
                f"states are not supported, and their real part alone would be another scan."
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{where}: {name} must be float32, float16, bfloat16 or float64, got {_name(tensor.dtype)}; "
                f"convert it with {name}.float()."
            )
        if (tensor.dtype == torch.float64) != double:
            raise ValueError(
                f"{where}: float64 does not mix with other types, but {name} is {_name(tensor.dtype)} "
                f"beside {_name(leader.dtype)}; convert all tensors or none to float64."
            )
        if tensor.device != leader.device:
            raise ValueError(
                f"{where}: all tensors must be on one device, but {name} is on {tensor.device} and the input on "
                f"{leader.device}; move it with {name}.to({str(leader.device)!r})."
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_out_dtype(where: str, out_dtype: torch.dtype | None, leader: Tensor) -> None:
    """Raise ValueError unless the output can have that type; float64 in and out go together."""
    if out_dtype is None:
        return
    if out_dtype not in FLOATS or (out_dtype == torch.float64) != (leader.dtype == torch.float64):
        found = _name(out_dtype) if isinstance(out_dtype, torch.dtype) else repr(out_dtype)
        raise ValueError(
            f"{where}: out_dtype must be torch.float32, torch.float16 or torch.bfloat16 (torch.float64 for float64 "
            f"input alone), got {found} for {_name(leader.dtype)} input; leave it out to get the input's type."
        )


def check(call: ScanCall) -> None:
    """Raise ValueError if a call of cross_selective_scan breaks the contract; by shapes and kinds, no value is read."""
    where = "cross_selective_scan"
    x, dt, A = call.x, call.dt, call.A
    require_dim(where, "x", x, "(batch, tokens, channels) or (batch, tokens, routes, channels)", (3, 4))
    require_dim(where, "A", A, "(routes, channels, states)", (3,))
    batch, tokens, channels = x.shape[0], x.shape[1], x.shape[-1]
    routes, states = A.shape[0], A.shape[2]
    if tokens < 1 or channels < 1 or routes < 1:
        raise ValueError(f"{where}: x must have at least one token, route and channel, got {_show(x.shape)}.")
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"{where}: A must have 1 to {MAX_STATES} states in its last axis, got {_show(A.shape)}.")
    if x.dim() == 4:
        letters = "(batch, tokens, routes, channels)"
        require_shape(where, "x", x, letters, (batch, tokens, routes, channels), "A has that many routes")
    require_shape(where, "A", A, "(routes, channels, states)", (routes, channels, states))
    wide = "(batch, tokens, routes, channels)"
    if call.dt_weight is None:
        hint = "" if call.dt.dim() == 4 and dt.shape[-1] == channels else "pass dt_weight with a low-rank dt"
        require_shape(where, "dt", dt, wide, (batch, tokens, routes, channels), hint)
    else:
        require_dim(where, "dt_weight", call.dt_weight, "(routes, channels, rank)", (3,))
        rank = call.dt_weight.shape[2]
        require_shape(where, "dt_weight", call.dt_weight, "(routes, channels, rank)", (routes, channels, rank))
        if rank < 1:
            raise ValueError(f"{where}: dt_weight must have a rank of at least 1, got {_show(call.dt_weight.shape)}.")
        require_shape(where, "dt", dt, "(batch, tokens, routes, rank)", (batch, tokens, routes, rank))
    for name, tensor in (("B", call.B), ("C", call.C)):
        letters = "(batch, tokens, routes, states)"
        require_shape(where, name, tensor, letters, (batch, tokens, routes, states), _axis_hint(tensor, call))
    for name, optional in (("D", call.D), ("dt_bias", call.dt_bias)):
        if optional is not None:
            require_shape(where, name, optional, "(routes, channels)", (routes, channels))
    if call.initial_state is not None:
        letters = "(batch, routes, channels, states)"
        require_shape(where, "initial_state", call.initial_state, letters, (batch, routes, channels, states))
    floats = dict(x=x, dt=dt, A=A, B=call.B, C=call.C, D=call.D, dt_weight=call.dt_weight, dt_bias=call.dt_bias)
    require_kind(where, floats | {"initial_state": call.initial_state}, x)
    require_out_dtype(where, call.out_dtype, x)
    if call.indices is not None:
        _check_table(where, call.indices, routes, x)


def _axis_hint(tensor: Tensor, call: ScanCall) -> str:
    if tensor.dim() == 4 and tuple(tensor.shape[1:]) == (call.routes, call.states, call.tokens):
        return "move the token axis to place 1"
    return ""


def _check_table(where: str, indices: Tensor, routes: int, leader: Tensor) -> None:
    require_dim(where, "indices", indices, "(routes, steps)", (2,))
    if indices.dtype != torch.int32:
        raise ValueError(f"{where}: indices must be int32, got {_name(indices.dtype)}; convert with indices.int().")
    require_shape(where, "indices", indices, "(routes, steps)", (routes, indices.shape[1]))
    if indices.shape[1] < 1:
        raise ValueError(f"{where}: indices must have at least one step, got {_show(indices.shape)}.")
    if indices.device != leader.device:
        raise ValueError(
            f"{where}: indices must be on the input's device {leader.device}, got {indices.device}; "
            f"move them with indices.to({str(leader.device)!r})."
        )


class Routed(Protocol):
    """A call of any operator that follows an index table."""

    @property
    def operator(self) -> str: ...
    @property
    def indices(self) -> Tensor | None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def steps(self) -> int: ...


class _Table(NamedTuple):
    """What was found in a table when it was read."""

    itself: weakref.ref[Tensor]
    version: int  # of its contents, when they were read
    tokens: int
    complete: bool  # whether every route visits every token


# Tables whose values were read and found good, by id. A table is read once, since reading costs a wait for the device;
# writing into it in place makes it be read again.
_tables: dict[int, _Table] = {}


def check_values(call: Routed) -> None:
    """Raise ValueError if the index table names a token out of range, or one token twice in a route.

    What is written into a table behind torch's back, through NumPy's view of it or `.data`, goes unseen.
    """
    if call.indices is not None and not call.indices.is_meta:
        _read_once(call.operator, call.indices, call.tokens)


def visits_all(call: Routed) -> bool:
    """Whether every route visits every token, so that a kernel that follows the routes writes all of its results.

    No, to be on the safe side, where the table cannot be read now.
    """
    return call.indices is None or covers(call.operator, call.indices, call.tokens)


def covers(where: str, indices: Tensor, tokens: int) -> bool:
    """Whether every route of a table visits every token; no, to be on the safe side, where it cannot be read now.

    Short tables are read too, although they cannot: a call like one seen before is checked nowhere else.
    """
    return _read_once(where, indices, tokens)


def _read_once(where: str, indices: Tensor, tokens: int) -> bool:
    """Read a table unless it was read as it is now; returns whether every route is known to visit every token."""
    known = _tables.get(id(indices))
    if known is not None:
        itself, version, of_tokens, complete = known
        if itself() is indices and version == indices._version and of_tokens == tokens:
            return complete
    original = constants.original(indices)
    if original is not indices:
        complete = _read_once(where, original, tokens)
    elif indices.is_cuda and constants.capturing():
        return False  # a graph's own memory holds nothing yet, and the warm-up before it has read what the table holds
    else:
        complete = _read_table(where, indices, tokens)
    if not indices.is_inference():  # which does not count what is written into it, and so is read each time
        key = id(indices)
        itself = weakref.ref(indices, lambda _: _tables.pop(key, None))
        _tables[key] = _Table(itself, indices._version, tokens, complete)
    return complete


def _read_table(where: str, indices: Tensor, tokens: int) -> bool:
    """Read an index table's values: each from -1 to tokens - 1, and no token twice in a route.

    Returns: whether every route visits every token.
    Raises: ValueError naming the route, the step and the value.
    """
    table = indices.detach().cpu().long()
    bad = (table < -1) | (table >= tokens)
    if bad.any():
        route, step = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{where}: indices must be -1 (padding) or a token from 0 to {tokens - 1}, got "
            f"{int(table[route, step])} at route {route}, step {step}; make the table with ScanOrder.indices(H, W)."
        )
    for route, row in enumerate(table):
        counts = torch.bincount(row[row >= 0], minlength=1)
        if int(counts.max()) > 1:
            token = int(counts.argmax())
            raise ValueError(
                f"{where}: a route visits a token at most once, but route {route} visits token {token} "
                f"{int(counts[token])} times; make that a second route."
            )
    return bool(((table >= 0).sum(1) == tokens).all())


def check_tensors(where: str, call: ScanCall) -> None:
    """Raise ValueError where an argument that must be a tensor is something else."""
    for name in ("x", "dt", "A", "B", "C", "D", "indices", "dt_weight", "dt_bias", "initial_state"):
        value = getattr(call, name)
        if not isinstance(value, Tensor) and not (value is None and name in ScanCall._field_defaults):
            raise ValueError(f"{where}: {name} must be a tensor, got {type(value).__name__}.")


def check_classic(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError if a call of selective_scan breaks the contract, in the words of its own layout."""
    where = "selective_scan"
    if not isinstance(u, Tensor):
        raise ValueError(f"{where}: u must be a tensor, got {type(u).__name__}.")
    required = dict(delta=delta, A=A, B=B, C=C)
    for name, tensor in required.items():
        if tensor is None:
            raise ValueError(f"{where}: {name} must be a tensor, got None.")
    optional = dict(D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    require_kind(where, {"u": u, **required, **optional}, u)
    require_dim(where, "u", u, "(batch, channels, length)", (3,))
    batch, width, length = u.shape
    if width < 1 or length < 1:
        raise ValueError(f"{where}: u must have at least one channel and one step, got {_show(u.shape)}.")
    require_dim(where, "A", A, "(channels, state)", (2,))
    states = A.shape[1]
    require_shape(where, "A", A, "(channels, state)", (width, states))
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"{where}: A must have 1 to {MAX_STATES} states in its last axis, got {_show(A.shape)}.")
    for name, maybe in dict(delta=delta, z=z).items():
        if maybe is not None:
            require_shape(where, name, maybe, "(batch, channels, length)", (batch, width, length))
    groups = {name: _check_weights(where, name, t, batch, width, states, length) for name, t in dict(B=B, C=C).items()}
    if None not in groups.values() and groups["B"] != groups["C"]:
        raise ValueError(f"{where}: B and C must have as many groups, got {_show(B.shape)} and {_show(C.shape)}.")
    for name, maybe in dict(D=D, delta_bias=delta_bias).items():
        if maybe is not None:
            require_shape(where, name, maybe, "(channels,)", (width,))
    if initial_state is not None:
        letters = "(batch, channels, state)"
        require_shape(where, "initial_state", initial_state, letters, (batch, width, states))
    require_out_dtype(where, out_dtype, u)


def _check_weights(
    where: str, name: str, tensor: Tensor, batch: int, width: int, states: int, length: int
) -> int | None:
    """Check the B or C of the classic layout; returns how many groups it has, None if it is the same for all tokens."""
    groups = tensor.shape[1] if tensor.dim() == 4 else 1
    forms = {
        3: ("(batch, state, length)", (batch, states, length)),
        4: ("(batch, groups, state, length)", (batch, groups, states, length)),
        2: ("(channels, state)", (width, states)),
    }
    require_dim(where, name, tensor, " or ".join(letters for letters, _ in forms.values()), tuple(forms))
    hint = "move the length axis last" if tensor.dim() > 2 and tensor.shape[-2:] == (length, states) else ""
    require_shape(where, name, tensor, *forms[tensor.dim()], hint)
    if groups < 1 or width % groups:
        raise ValueError(
            f"{where}: the groups of {name} must divide the channels of u, got {groups} groups for {width} "
            f"channels; repeat or merge groups."
        )
    return None if tensor.dim() == 2 else groups
