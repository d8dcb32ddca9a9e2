"""Named scans for the tests: shapes and options as data, and the random tensors that go with them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vision_mamba import scans
from vision_mamba.ops.call import GRADIENTS, ScanCall

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Case:
    """One scan. `order` names a scan order on the grid, or is None for no index table."""

    grid: tuple[int, int] = (5, 7)
    batch: int = 2
    channels: int = 20
    states: int = 3
    routes: int = 2
    order: str | None = None
    shared_x: bool = True
    merge: bool = True
    rank: int = 0
    skip: bool = True
    bias: bool = True
    softplus: bool = True
    state: bool = False  # an initial state goes in and the last one comes out
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32, F32)  # of x, dt, B, C
    out_dtype: torch.dtype | None = None
    layout: str = "plain"  # how the tensors lie in memory, see LAYOUTS

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        default = Case()
        changed = {key: value for key, value in vars(self).items() if value != vars(default)[key]}
        return ",".join(f"{key}={_short(value)}" for key, value in changed.items()) or "default"


def _short(value: object) -> str:
    return str(value).replace("torch.", "").replace(" ", "").replace("float", "f")


def _plain(t: Tensor) -> Tensor:
    return t


def _sliced(t: Tensor) -> Tensor:
    """A slice of a wider tensor: rows are longer than what is read of them, and start off the alignment."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
    wide[..., 3:-2] = t
    return wide[..., 3:-2]


def _channels_first(t: Tensor) -> Tensor:
    """Tokens at stride 1, as in the classic layout."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _every_other(t: Tensor) -> Tensor:
    """No axis at stride 1."""
    return torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0]


def _expanded(t: Tensor) -> Tensor:
    """One batch item seen many times, at stride 0."""
    return t[:1].expand_as(t)


LAYOUTS = dict(
    plain=_plain, sliced=_sliced, channels_first=_channels_first, every_other=_every_other, expanded=_expanded
)


def make_call(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> ScanCall:
    """Random arguments for a case, rounded to its types; the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    table = scans.get(case.order).indices(*case.grid) if case.order else None
    routes = case.routes if table is None else table.shape[0]
    wide = (case.batch, case.tokens, routes)
    x = random(case.batch, case.tokens, case.channels) if case.shared_x else random(*wide, case.channels)
    dt = 0.5 * random(*wide, case.rank or case.channels)
    # Without softplus the step sizes themselves must be positive for the state to stay bounded.
    dt = dt if case.softplus else dt.abs() * 0.2
    weights = [random(*wide, case.states) for _ in range(2)]
    place = LAYOUTS[case.layout]
    x, dt, B, C = (
        place(t.to(dtype)).to(device) if case.layout == "plain" else place(t.to(dtype).to(device))
        for t, dtype in zip((x, dt, *weights), case.dtypes, strict=True)
    )
    base = F64 if case.dtypes[0] == F64 else F32
    per_channel = (routes, case.channels)

    def parameter(t: Tensor) -> Tensor:
        return t.to(device, base)

    weight = random(*per_channel, case.rank) / max(case.rank, 1) ** 0.5
    return ScanCall(
        x,
        dt,
        A=parameter(-torch.exp(random(*per_channel, case.states))),
        B=B,
        C=C,
        D=parameter(random(*per_channel)) if case.skip else None,
        indices=None if table is None else table.to(device),
        dt_weight=parameter(weight if case.softplus else weight.abs()) if case.rank else None,
        dt_bias=parameter(random(*per_channel) if case.softplus else random(*per_channel).abs() * 0.1)
        if case.bias
        else None,
        initial_state=parameter(random(case.batch, *per_channel, case.states)) if case.state else None,
        dt_softplus=case.softplus,
        merge=case.merge,
        return_last_state=case.state,
        out_dtype=case.out_dtype,
    )


def run(call: ScanCall, backend: str, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and every gradient of a scan, by name, for a random gradient of the outputs."""
    call = call._replace(
        **{n: getattr(call, n).detach().requires_grad_() for n in GRADIENTS if getattr(call, n) is not None}
    )
    y, last = torch.ops.vision_mamba.cross_selective_scan(*call, backend)
    outputs = dict(y=y) | (dict(last_state=last) if call.return_last_state else {})
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bfloat16, so that every backend in every type and the float64 reference see the same numbers.
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs.values()]
    torch.autograd.backward(list(outputs.values()), grads)
    tensors = {n: getattr(call, n) for n in GRADIENTS}
    return outputs | {f"d{n}": t.grad for n, t in tensors.items() if t is not None}


def double(call: ScanCall) -> ScanCall:
    """The same numbers in float64, contiguous on the CPU: what the reference is run on."""

    def widen(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return value.contiguous().double() if value.is_floating_point() else value

    return ScanCall(*map(widen, call))._replace(out_dtype=None)


def options() -> list[Case]:
    """Every combination of options that takes another path through some kernel, on a small grid."""
    cases = []
    for number, (shared, merge, rank, order, state) in enumerate(
        itertools.product((True, False), (True, False), (0, 5), (None, "local_2", "atrous_2"), (False, True))
    ):
        flags = dict(skip=number % 3 != 0, bias=number % 4 != 1, softplus=number % 5 != 2)
        cases.append(Case(shared_x=shared, merge=merge, rank=rank, order=order, state=state, **flags))
    return cases


def shapes() -> list[Case]:
    """Odd lengths, states and widths; the long ones narrow, so that the reference stays quick."""
    lengths = ((1, 1), (1, 2), (7, 9), (1, 197))
    small = [Case(grid=grid, states=states, order="bidirectional") for grid in lengths for states in (1, 3, 16, 64)]
    long = [Case(grid=(56, 56), states=states, order="cross", batch=1, channels=17) for states in (1, 16)]
    widths = [Case(channels=channels, states=1, order="cross", rank=3) for channels in (1, 15, 16, 33, 96, 130)]
    return small + long + widths + [Case(channels=3, states=256), Case(batch=1, routes=1, state=True)]


def types() -> list[Case]:
    """Half precision and mixtures of it, with and without another type for the result."""
    halves = [
        Case(dtypes=(dtype,) * 4, order="cross", states=states, rank=4) for dtype in (F16, BF16) for states in (1, 16)
    ]
    mixed = [
        Case(dtypes=(BF16, F32, BF16, F32), order="cross"),
        Case(dtypes=(F32, BF16, F16, BF16), shared_x=False, merge=False, state=True),
        Case(dtypes=(F16, F16, F32, F32), order="local_2", rank=4),
    ]
    outputs = [replace(halves[0], out_dtype=F32), replace(halves[2], out_dtype=F16, merge=False), Case(out_dtype=BF16)]
    return halves + mixed + outputs


def layouts() -> list[Case]:
    """The ways in which callers' tensors lie in memory."""
    return [
        Case(layout=layout, dtypes=(dtype,) * 4, order="cross", shared_x=shared, merge=shared, states=states)
        for layout, dtype, states in (
            ("sliced", F32, 1), ("sliced", BF16, 16), ("channels_first", F32, 16), ("channels_first", BF16, 1),
            ("every_other", F32, 3), ("expanded", F32, 16),
        )
        for shared in (True, False)
    ]  # fmt: skip
