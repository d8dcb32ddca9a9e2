"""The public state-space dual scan: what it equals, what it refuses, and how the rest of torch sees it."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import BF16, F32
from tests.ops.ssd_cases import SsdCase, make_call, run
from vision_mamba import ops, scans
from vision_mamba.ops import BackendError, registry
from vision_mamba.ops.ssd_call import GRADIENTS, SsdCall

scan = torch.ops.vision_mamba.ssd
F64 = torch.float64


def arguments(batch: int = 2, length: int = 20, groups: int = 1, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """H 4, P 3, N 5."""
    return dict(
        x=torch.randn(batch, length, 4, 3, dtype=dtype),
        dt=torch.rand(batch, length, 4, dtype=dtype),
        A=-torch.rand(4, dtype=dtype),
        B=torch.randn(batch, length, groups, 5, dtype=dtype),
        C=torch.randn(batch, length, groups, 5, dtype=dtype),
        D=torch.randn(4, dtype=dtype),
    )


def as_matrix(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The dual form: one product with a lower triangular matrix of the whole length."""
    length = x.shape[1]
    total = (dt * A).cumsum(1)
    decay = (total.unsqueeze(2) - total.unsqueeze(1)).exp() * torch.ones(length, length, dtype=x.dtype).tril()[
        ..., None
    ]
    matrix = torch.einsum("bin,bjn->bij", C[:, :, 0], B[:, :, 0]).unsqueeze(-1) * decay * dt.unsqueeze(1)
    return torch.einsum("bijh,bjhp->bihp", matrix, x) + D[:, None] * x


def test_is_a_matrix() -> None:
    given = arguments()
    assert torch.allclose(ops.ssd(**given), as_matrix(**given))


def test_is_a_selective_scan_whose_channels_share_a_decay() -> None:
    given = arguments(groups=2)
    wide = lambda t: t.repeat_interleave(3, -1)  # noqa: E731  (H,) -> (H * P,)
    y = ops.selective_scan(
        given["x"].flatten(2).mT,
        wide(given["dt"]).mT,
        wide(given["A"]).unsqueeze(1).expand(-1, 5),
        given["B"].movedim(1, -1),
        given["C"].movedim(1, -1),
        wide(given["D"]),
    )
    assert torch.allclose(ops.ssd(**given).flatten(2), y.mT)


def test_directions() -> None:
    given = arguments()
    causal = ops.ssd(**given)
    flipped = {name: t.flip(1) if t.dim() > 1 else t for name, t in given.items()}
    backwards = ops.ssd(**given, direction="reversed")
    assert torch.allclose(backwards, ops.ssd(**flipped).flip(1))
    skip = given["D"][:, None] * given["x"]
    assert torch.allclose(ops.ssd(**given, direction="both"), causal + backwards - skip)
    w = -given["dt"] * given["A"]
    state = torch.einsum("blh,bln,blhp->bhpn", w, given["B"][:, :, 0], given["x"])
    y, last = ops.ssd(**given, direction="none", return_last_state=True)
    assert torch.allclose(last, state)
    assert torch.allclose(y, torch.einsum("bln,bhpn->blhp", given["C"][:, :, 0], state) + skip)


def test_routes_are_what_a_table_says() -> None:
    """Routes of a table against a scan each of permuted copies."""
    indices = scans.CROSS.indices(3, 4)
    x = torch.randn(2, 12, 4, 3, dtype=F64)
    dt, A, D = torch.rand(2, 12, 4, 4, dtype=F64), -torch.rand(4, 4, dtype=F64), torch.randn(4, 4, 3, dtype=F64)
    B, C = torch.randn(2, 12, 4, 2, 5, dtype=F64), torch.randn(2, 12, 4, 2, 5, dtype=F64)
    expected = torch.zeros_like(x)
    for k, route in enumerate(indices.long()):
        along = [t[:, route] for t in (x, dt[:, :, k], B[:, :, k], C[:, :, k])]
        expected[:, route] += ops.ssd(along[0], along[1], A[k], along[2], along[3], D[k])
    assert torch.allclose(ops.ssd(x, dt, A, B, C, D, indices=indices), expected)
    apart = ops.ssd(x, dt, A, B, C, D, indices=indices, merge=False)
    assert apart.shape == (2, 12, 4, 4, 3) and torch.allclose(apart.sum(2), expected)
    order = scans.BIDIRECTIONAL.indices(1, 12)
    both = ops.ssd(x, *(t[..., :1, :].expand(*t.shape[:-2], 2, 4) for t in (dt, A)),
                   *(t[:, :, :1].expand(-1, -1, 2, -1, -1) for t in (B, C)), indices=order)  # fmt: skip
    assert torch.allclose(both, ops.ssd(x, dt[:, :, 0], A[0], B[:, :, 0], C[:, :, 0], direction="both"))


@pytest.mark.parametrize("direction", ["causal", "reversed", "both", "none"])
def test_states_continue_a_sequence(direction: str) -> None:
    given = arguments(groups=2)
    parts = [{name: t.split([8, 12], 1)[i] if t.dim() > 1 else t for name, t in given.items()} for i in (0, 1)]
    whole, last = ops.ssd(**given, direction=direction, return_last_state=True)
    assert last.shape == ((2, 2, 4, 3, 5) if direction == "both" else (2, 4, 3, 5))
    if direction in ("both", "none"):
        return
    first, second = parts if direction == "causal" else parts[::-1]
    y1, state = ops.ssd(**first, direction=direction, return_last_state=True)
    y2, state = ops.ssd(**second, direction=direction, initial_state=state, return_last_state=True)
    pair = (y1, y2) if direction == "causal" else (y2, y1)
    assert torch.allclose(torch.cat(pair, 1), whole) and torch.allclose(state, last)


def test_step_sizes() -> None:
    given = arguments()
    given["dt"] = torch.randn_like(given["dt"])
    bias = torch.randn(4, dtype=F64)
    steps = F.softplus(given["dt"] + bias).clamp(0.2, 0.8)
    found = ops.ssd(**given, dt_bias=bias, dt_softplus=True, dt_limit=(0.2, 0.8))
    assert torch.allclose(found, ops.ssd(**given | {"dt": steps}))
    assert torch.allclose(ops.ssd(**given), ops.ssd(**given | {"dt": given["dt"].clamp(min=0)}))


REFUSALS = [
    (
        dict(dt=torch.zeros(2, 20, 3, dtype=F64)),
        r"ssd: dt must be \(batch, tokens, heads\) = \(2, 20, 4\), got \(2, 20, 3\)",
    ),
    (dict(x=torch.zeros(2, 20, 12, dtype=F64)), r"ssd: x must be \(batch, tokens, heads, channels\), got 3 dim"),
    (dict(A=torch.zeros(4, 1, dtype=F64)), r"ssd: A must be \(heads\), got 2 dimensions"),
    (dict(C=torch.zeros(2, 20, 2, 5, dtype=F64)), r"ssd: C must be .* got \(2, 20, 2, 5\); B and C have one shape"),
    (dict(D=torch.zeros(3, dtype=F64)), r"ssd: D must be \(heads\) = \(4\), got \(3\); one skip weight a head, or"),
    (dict(D=torch.zeros(4, 2, dtype=F64)), r"ssd: D must be \(heads, channels\) = \(4, 3\)"),
    (dict(dt_bias=torch.zeros(3, dtype=F64)), r"ssd: dt_bias must be \(heads\) = \(4\)"),
    (dict(initial_state=torch.zeros(2, 4, 5, 3, dtype=F64)), r"ssd: initial_state must be \(batch, heads, channels, "),
    (
        dict(initial_state=torch.zeros(2, 4, 3, 5, dtype=F64), direction="both"),
        r"ssd: initial_state must be \(batch, routes, heads, channels, states\) = \(2, 2, 4, 3, 5\)",
    ),
    (dict(A=torch.zeros(4)), r"ssd: float64 does not mix with other types, but A is float32"),
    (dict(A=None), r"ssd: A must be a tensor, got NoneType"),
    (dict(direction="left"), r"ssd: direction must be one of causal, reversed, both, none, got 'left'"),
    (dict(dt_limit=None), r"ssd: dt_limit must be \(lowest, highest\), got None"),
    (dict(merge=False), "ssd: merge=False keeps the routes of an index table apart; give indices"),
    (dict(chunk=2.5), "ssd: chunk must be a number of tokens from 1, or None for the best, got 2.5"),
    (dict(dt_limit=(1.0, 0.5)), r"ssd: dt_limit must be \(lowest, highest\) with lowest < highest, got \(1.0, 0.5\)"),
    (dict(chunk=0), r"ssd: chunk must be a number of tokens from 1, or None for the best, got 0"),
    (dict(out_dtype=torch.int32), r"ssd: out_dtype must be"),
    (dict(indices=torch.zeros(1, 20, dtype=torch.int32)), r"ssd: A must be \(routes, heads\), got 1 dimensions"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.ssd(**arguments() | changes)


def test_refusals_of_sizes() -> None:
    wrong = torch.zeros(2, 20, 3, 5, dtype=F64)
    with pytest.raises(ValueError, match="the groups of B must divide the heads of x, got 3 groups for 4 heads"):
        ops.ssd(**arguments() | dict(B=wrong, C=wrong))
    wrong = torch.zeros(2, 20, 1, 257, dtype=F64)
    with pytest.raises(ValueError, match="B must have 1 to 256 states in its last axis, got 257"):
        ops.ssd(**arguments() | dict(B=wrong, C=wrong))
    with pytest.raises(ValueError, match="x must have at least one token, route, head and channel"):
        ops.ssd(**arguments(length=0))


def test_refusals_of_tables() -> None:
    call = make_call(SsdCase(order="cross"))
    tables = dict(x=call.x, dt=call.dt, A=call.A, B=call.B, C=call.C, indices=call.indices)
    with pytest.raises(ValueError, match="direction must be 'causal' or 'none' with indices, got 'both'; a route that"):
        ops.ssd(**tables, direction="both")
    with pytest.raises(ValueError, match="indices must be int32"):
        ops.ssd(**tables | dict(indices=call.indices.long()))
    with pytest.raises(ValueError, match="from 0 to 34"):
        ops.ssd(**tables | dict(indices=torch.full_like(call.indices, 35)))
    with pytest.raises(ValueError, match=r"descending must be .*0 beside an index table, got 1"):
        scan(*call._replace(descending=1))


def test_backends_by_name() -> None:
    given = arguments(dtype=F32)
    assert list(ops.available_backends("cpu", "ssd")) == ["triton", "cpu", "eager", "reference"]
    with pytest.raises(BackendError, match=r"ssd: backend 'cuda' does not implement it; those that do are .*eager"):
        ops.ssd(**given, backend="cuda")
    with ops.use_backend("cpu"), pytest.raises(BackendError, match=r"ssd: backend 'cpu' refuses .*: without an order"):
        ops.ssd(**given, direction="none")
    with pytest.raises(BackendError, match=r"backend 'eagre' is unknown, .*; did you mean 'eager'\?"):
        ops.ssd(**given, backend="eagre")
    with pytest.raises(ValueError, match="operator must be one of cross_selective_scan, ssd, got 'sdd'"):
        ops.available_backends("cpu", "sdd")


def test_plain_torch_is_no_slow_backend_on_a_cpu(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_announced", set())
    with caplog.at_level(logging.INFO, logger="vision_mamba"):
        ops.ssd(**arguments(dtype=F32), direction="none")
        ops.ssd(**arguments(dtype=F32), direction="none")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "state-space dual scan on cpu: backend 'eager'")
    ]


@pytest.mark.parametrize(
    "case",
    [
        SsdCase(routes=2, descending=1, merge=False, state=True, skip=None, bias=False, limits=(0.1, 0.6)),
        SsdCase(shared_x=False, layout="channels_first", dtypes=(BF16, F32, BF16, F32), causal=False),
    ],
    ids=str,
)
def test_opcheck(case: SsdCase) -> None:
    call = make_call(case)
    call = call._replace(**{n: t.requires_grad_() for n in GRADIENTS if (t := getattr(call, n)) is not None})
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Tracing the derivative of the chunks for symbolic sizes takes half a minute, and is that of the other form.
    torch.library.opcheck(
        scan.default, (*call, "eager"), test_utils=tests + ["test_aot_dispatch_dynamic"] * (not case.causal)
    )
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in call)
    torch.library.opcheck(
        torch.ops.vision_mamba.ssd_forward.default, (*plain, "eager"), test_utils=("test_schema", "test_faketensor")
    )


class Mixer(nn.Module):
    """The least that a model does with the operator."""

    def __init__(self, direction: str = "both") -> None:
        super().__init__()
        self.weights = nn.Linear(6, 2 + 2 * 3)
        self.A_log = nn.Parameter(torch.zeros(2))
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        dt, B, C = self.weights(x).split([2, 3, 3], -1)
        B, C = B.unsqueeze(2), C.unsqueeze(2)
        heads = x.unflatten(-1, (2, 3))
        return ops.ssd(heads, dt, -self.A_log.exp(), B, C, dt_softplus=True, direction=self.direction).flatten(2)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(module(x).square().sum(), list(module.parameters())))


def test_compiles_to_one_graph_for_any_size() -> None:
    mixer = Mixer()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 15), (3, 28)):
        x = torch.randn(*size, 6)
        torch.testing.assert_close(compiled(x), mixer(x))
        for found, expected in zip(gradients(compiled, x), gradients(mixer, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_exports_for_any_size() -> None:
    mixer = Mixer()
    sizes = {axis: torch.export.Dim(name, min=2, max=64) for axis, name in enumerate(("batch", "length"))}
    program = torch.export.export(mixer, (torch.randn(2, 15, 6),), dynamic_shapes={"x": sizes}, strict=False)
    x = torch.randn(3, 24, 6)
    torch.testing.assert_close(program.module()(x), mixer(x))
    assert [node.target for node in program.graph.nodes].count(scan.default) == 1  # one node, whatever the length


def test_runs_on_meta() -> None:
    mixer = Mixer().to("meta")
    y = mixer(torch.randn(2, 15, 6, device="meta"))
    assert y.is_meta and y.shape == (2, 15, 6)
    y.sum().backward()
    assert mixer.A_log.grad is not None and mixer.A_log.grad.is_meta


def test_autocast_changes_no_bit() -> None:
    call = make_call(SsdCase(order="cross", states=16))
    expected = run(call, "eager")
    with torch.autocast("cpu", dtype=BF16):
        found = run(call, "eager")
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def test_frozen_arguments_get_no_gradient() -> None:
    call = make_call(SsdCase())
    x = call.x.requires_grad_()
    scan(*call._replace(x=x))[0].sum().backward()
    assert x.grad is not None and call.dt.grad is None and call.A.grad is None


@pytest.mark.parametrize(("causal", "state_flops"), [(True, 5), (False, 4)])
def test_flops_are_counted_forward_and_backward(causal: bool, state_flops: int) -> None:
    call: SsdCall = make_call(SsdCase(routes=2, causal=causal))
    forward = 2 * 35 * 2 * 4 * 5 * (state_flops * 3 + 3)
    with FlopCounterMode(display=False) as counter:
        scan(*call)
    assert counter.get_total_flops() == forward
    call = call._replace(x=call.x.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        scan(*call, "eager")[0].sum().backward()
    assert counter.get_total_flops() >= forward


def test_an_unlimited_step_size_is_the_default() -> None:
    given = arguments()
    assert torch.equal(ops.ssd(**given), ops.ssd(**given, dt_limit=(0.0, math.inf)))
