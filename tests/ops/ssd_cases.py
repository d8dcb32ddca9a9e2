"""Named state-space dual scans for the tests: shapes and options as data, and the random tensors that go with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.cases import BF16, F16, F32, F64, LAYOUTS
from vision_mamba import scans
from vision_mamba.ops.ssd_call import GRADIENTS, SsdCall


@dataclass(frozen=True)
class SsdCase:
    """One scan. `order` names a scan order on the grid, or is None for no index table."""

    grid: tuple[int, int] = (5, 7)
    batch: int = 2
    heads: int = 4
    channels: int = 5
    groups: int = 2
    states: int = 3
    routes: int = 1
    order: str | None = None
    causal: bool = True
    descending: int = 0
    shared_x: bool = True
    merge: bool = True
    skip: str | None = "heads"  # or "channels", or None
    bias: bool = True
    softplus: bool = True
    limits: tuple[float, float | None] = (0.0, None)
    state: bool = False  # an initial state goes in and the last one comes out
    chunk: int | None = None
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32, F32)  # of x, dt, B, C
    out_dtype: torch.dtype | None = None
    layout: str = "plain"  # how the tensors lie in memory, see tests.cases.LAYOUTS

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        default = SsdCase()
        changed = {key: value for key, value in vars(self).items() if value != vars(default)[key]}
        short = {key: str(value).replace("torch.", "").replace(" ", "") for key, value in changed.items()}
        return ",".join(f"{key}={value.replace('float', 'f')}" for key, value in short.items()) or "default"


def make_call(case: SsdCase, seed: int = 0, device: torch.device | str = "cpu") -> SsdCall:
    """Random arguments for a case, rounded to its types; the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    table = scans.get(case.order).indices(*case.grid) if case.order else None
    routes = case.routes if table is None else table.shape[0]
    wide = (case.batch, case.tokens, routes)
    heads = (case.heads, case.channels)
    x = random(case.batch, case.tokens, *heads) if case.shared_x else random(*wide, *heads)
    dt = 0.5 * random(*wide, case.heads)
    weights = [random(*wide, case.groups, case.states) for _ in range(2)]
    place = LAYOUTS[case.layout]
    x, dt, B, C = (place(t.to(dtype).to(device)) for t, dtype in zip((x, dt, *weights), case.dtypes, strict=True))
    base = F64 if case.dtypes[0] == F64 else F32

    def parameter(t: Tensor) -> Tensor:
        return t.to(device, base)

    per_head = (routes, case.heads)
    return SsdCall(
        x,
        dt if case.softplus else dt.abs(),
        A=parameter(-torch.exp(random(*per_head))),
        B=B,
        C=C,
        D=parameter(random(routes, *(heads if case.skip == "channels" else heads[:1]))) if case.skip else None,
        indices=None if table is None else table.to(device),
        dt_bias=parameter(random(*per_head) if case.softplus else random(*per_head).abs()) if case.bias else None,
        initial_state=parameter(random(case.batch, *per_head, case.channels, case.states)) if case.state else None,
        causal=case.causal,
        descending=case.descending,
        dt_softplus=case.softplus,
        dt_min=case.limits[0],
        dt_max=case.limits[1],
        merge=case.merge,
        return_last_state=case.state,
        chunk=case.chunk,
        out_dtype=case.out_dtype,
    )


def run(call: SsdCall, backend: str, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and every gradient of a scan, by name, for a random gradient of the outputs."""
    tensors = {n: t.detach().requires_grad_() for n in GRADIENTS if (t := getattr(call, n)) is not None}
    y, last = torch.ops.vision_mamba.ssd(*call._replace(**tensors), backend)
    outputs = dict(y=y) | (dict(last_state=last) if call.return_last_state else {})
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bfloat16, so that every backend in every type and the float64 reference see the same numbers.
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs.values()]
    torch.autograd.backward(list(outputs.values()), grads)
    return outputs | {f"d{n}": t.grad for n, t in tensors.items()}


def double(call: SsdCall) -> SsdCall:
    """The same numbers in float64, contiguous on the CPU: what the reference is run on."""

    def widen(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return value.contiguous().double() if value.is_floating_point() else value

    return SsdCall(*map(widen, call))._replace(out_dtype=None)


def options() -> list[SsdCase]:
    """Options that take another path through some kernel, on a small grid."""
    return [
        SsdCase(),
        SsdCase(state=True, skip="channels", groups=1),
        SsdCase(descending=1, state=True, groups=4),
        SsdCase(routes=2, descending=1, state=True),
        SsdCase(routes=2, descending=1, merge=False, shared_x=False, skip=None),
        SsdCase(routes=3, descending=2, skip="channels"),
        SsdCase(softplus=False, bias=False, limits=(0.1, 0.6)),
        SsdCase(limits=(0.3, 1.0), skip=None, state=True),
        SsdCase(causal=False, state=True),
        SsdCase(causal=False, routes=2, skip="channels", limits=(0.3, 1.0)),
        SsdCase(causal=False, order="atrous_2", merge=False, groups=1),
        SsdCase(causal=False, order="local_2", state=True, softplus=False),
        SsdCase(order="cross", state=True),
        SsdCase(order="cross", merge=False, shared_x=False, skip="channels"),
        SsdCase(order="local_2", state=True, merge=False),  # with padding steps
        SsdCase(order="atrous_2", shared_x=False, groups=1),  # with tokens off each route
        SsdCase(chunk=1),
        SsdCase(chunk=7, state=True, order="bidirectional"),
        SsdCase(chunk=1000),
    ]


def shapes() -> list[SsdCase]:
    """Odd lengths, states, heads and channels."""
    lengths = [SsdCase(grid=(1, n), state=True) for n in (1, 2, 49, 63, 64, 65, 196, 197)]
    sizes = [
        SsdCase(heads=1, groups=1, channels=1, states=1),
        SsdCase(heads=6, groups=3, channels=64, states=16),
        SsdCase(heads=3, groups=1, channels=48, states=48, grid=(1, 70)),
        SsdCase(heads=2, groups=1, channels=33, states=128),
        SsdCase(heads=2, groups=2, channels=16, states=256, grid=(1, 33)),
        SsdCase(heads=24, groups=1, channels=4, states=5),
        SsdCase(heads=2, groups=1, channels=128, states=7),
    ]
    return [*lengths, *sizes, SsdCase(grid=(56, 56), batch=1, heads=2, groups=1)]


def types() -> list[SsdCase]:
    """Half precision and mixtures of it, with and without another type for the result."""
    return [
        SsdCase(dtypes=(F16,) * 4, states=16, state=True),
        SsdCase(dtypes=(BF16,) * 4, states=16, grid=(1, 130)),
        SsdCase(dtypes=(BF16,) * 4, causal=False),
        SsdCase(dtypes=(F16,) * 4, order="cross", causal=False),
        SsdCase(dtypes=(BF16, F32, BF16, F32), routes=2, descending=1),
        SsdCase(dtypes=(F32, BF16, F16, BF16), shared_x=False, merge=False, state=True),
        SsdCase(dtypes=(F16, F16, F32, F32), order="local_2"),
        SsdCase(dtypes=(F16,) * 4, out_dtype=F32),
        SsdCase(dtypes=(BF16,) * 4, out_dtype=F16, merge=False),
        SsdCase(out_dtype=BF16),
    ]


def layouts() -> list[SsdCase]:
    """The ways in which callers' tensors lie in memory."""
    names = ("sliced", "channels_first", "every_other", "expanded")
    return [
        SsdCase(layout=layout, dtypes=(dtype,) * 4, routes=2, descending=1, shared_x=shared, merge=shared)
        for layout, dtype in zip(names, (BF16, F32, F16, F32), strict=True)
        for shared in (True, False)
    ]
