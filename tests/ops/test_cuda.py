"""The CUDA kernels on a GPU: against the float64 reference, in every memory layout, on any stream, again and again."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import BF16, F16, F32, Case, make_call, run
from tests.tolerances import assert_close
from vision_mamba import ops
from vision_mamba.ops import autograd
from vision_mamba.ops.backends import backward_cuda, cuda, forward_cuda, gpu, nvrtc, wide_cuda
from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.known import Known

pytestmark = pytest.mark.gpu
takes_call = few.takes_call


def tuned() -> list[Case]:
    """Shapes that each way of sharing lanes and each vector width is made for, in the types that models use."""
    half = (BF16,) * 4
    found = [
        Case(channels=channels, states=states, order="cross", dtypes=half, rank=rank, grid=(9, 11))
        for states in (1, 2, 4, 8, 16, 24, 32, 64, 100, 256)
        for channels, rank in ((96, 0), (64, 6))
    ]
    found += [Case(channels=128, states=16, order="bidirectional", dtypes=(t,) * 4, grid=(1, 197)) for t in (F16, F32)]
    found += [Case(channels=192, states=states, order="cross", dtypes=half, grid=(28, 28)) for states in (1, 16)]
    # Blocks enough that they add up the routes themselves; whole segments of seven and eight, and others.
    merged = (((56, 56), 16, 140), ((28, 28), 32, 70), ((14, 14), 48, 50), ((16, 16), 32, 70), ((9, 11), 40, 60))
    found += [
        Case(channels=channels, batch=batch, states=1, order="cross", rank=rank, dtypes=half, grid=grid)
        for grid, channels, batch in merged
        for rank in (0, 6)
    ]
    found += [
        Case(channels=48, batch=50, states=1, order="cross", rank=rank, dtypes=half, grid=(14, 14), state=True)
        for rank in (5, 24, 48)
    ]
    found += [Case(channels=64, batch=100, states=16, dtypes=half, shared_x=False, merge=False, grid=(1, 65))]
    found += [Case(channels=72, rank=rank, order="cross", dtypes=(F32,) * 4) for rank in (1, 48, 64, 65)]
    return found


@pytest.fixture
def many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequences are few, so that small scans go the way of large ones, in both passes."""
    monkeypatch.setattr(few, "takes_call", lambda *_, **__: False)
    monkeypatch.setattr(forward_cuda, "runners", {})
    monkeypatch.setattr(autograd.operator, "known", Known(10, 5))
    monkeypatch.setattr(backward_cuda, "plans", {})


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    # In float64 on the GPU, where the reference's small steps cost least.
    call = cases.double(make_call(case))
    return run(ScanCall(*(v.cuda() if isinstance(v, Tensor) else v for v in call)), "reference")


@pytest.mark.parametrize("case", cases.options() + cases.shapes() + cases.types() + cases.layouts() + tuned(), ids=str)
def test_matches_the_reference(case: Case, poisoned: None, many_sequences: None) -> None:
    found = run(make_call(case, device="cuda"), "cuda")
    assert found.keys() == expected(case).keys()
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)


def walked() -> list[Case]:
    """Scans for the walking kernels: odd lengths, every way to share lanes and to read step sizes, the types mixed."""
    half = (BF16,) * 4
    found = [
        Case(channels=channels, states=1, order="cross", rank=rank, dtypes=half, grid=grid, state=grid[0] % 2 == 1)
        for grid in ((1, 1), (5, 7), (14, 14))
        for channels, rank in ((96, 0), (64, 6), (32, 24), (128, 48), (96, 2))
    ]
    mixed = ((F32, F32, F32, F32), (F16, F16, F16, F16), (F16, BF16, F32, F16), (BF16, F32, F16, F32))
    found += [Case(channels=64, states=1, order="cross", grid=(9, 11), dtypes=types, state=True) for types in mixed]
    found += [Case(channels=192, states=1, grid=(1, 197), shared_x=False, merge=False, dtypes=half, out_dtype=F32)]
    found += [Case(channels=160, states=1, routes=3, grid=(1, 33), skip=False, bias=False, dtypes=half)]
    return [*found, Case(channels=32, states=1, order="cross", grid=(56, 56), dtypes=(F32,) * 4)]


def paired() -> list[Case]:
    """Scans of four routes whose sums are in bfloat16: one step, whole tiles and others, low ranks, the types mixed."""
    half = (BF16,) * 4
    found = [
        Case(channels=channels, states=1, order="cross", rank=rank, dtypes=half, grid=grid, state=grid[0] % 2 == 1)
        for grid in ((1, 3), (1, 31), (5, 7), (16, 16), (56, 56))
        for channels, rank in ((96, 0), (64, 6), (32, 8), (32, 2))
    ]
    one = Case(channels=96, states=1, order="cross", grid=(1, 1), dtypes=half)
    found += [one, replace(one, grid=(3, 5), skip=False, bias=False)]
    mixed = (BF16, F16, F32, F16)
    found += [replace(one, grid=(9, 11), batch=3, shared_x=False, dtypes=(F16, F16, F32, F16), out_dtype=BF16)]
    return [*found, Case(channels=32, states=1, order="cross", grid=(9, 11), dtypes=mixed, state=True)]


def check_walks(case: Case, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the reference, in every tensor, by this kernel; twice the same."""
    launched, make = [], getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *how: launched.append(how) or make(*how))
    monkeypatch.setattr(kernels, "walks", lambda *_: True)
    found = run(make_call(case, device="cuda"), "cuda")
    assert launched
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)
    again = run(make_call(case, device="cuda"), "cuda")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("pieces", ["whole", "segments", "batch in turn"])
@pytest.mark.parametrize("case", walked(), ids=str)
def test_walks(case: Case, pieces: str, poisoned: None, many_sequences: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces != "segments":
        monkeypatch.setattr(kernels, "wide_segments", lambda *_: (1, 0))
    if pieces == "batch in turn":
        assert case.batch % 2 == 0
        monkeypatch.setattr(kernels, "walk_items", lambda *_: 2)
    check_walks(case, "walk_forward", monkeypatch)


SHORT, LONG = "Bfloat", "Float"  # sums in shared memory


MERGED = [(1, 1, 2, SHORT), (1, 1, 1, LONG), (2, 1, 2, SHORT), (2, 1, 3, LONG), (1, 2, 1, SHORT), (2, 2, 2, LONG)]


@pytest.mark.parametrize(
    ("case", "per_lane", "turns", "stages", "sums"),
    [
        pytest.param(case, *way, id=f"{case}-{'-'.join(map(str, way))}")
        for case, way in itertools.product(walked(), MERGED)
        if case.merge and case.tokens < 3000 and case.channels % (32 * way[0]) == 0  # a warp's channels divide them
    ],
)
def test_walks_that_add_up_routes(
    case: Case,
    per_lane: int,
    turns: int,
    stages: int,
    sums: str,
    poisoned: None,
    many_sequences: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = kernels.Merged(per_lane, turns, stages, 8, rank=case.rank, sums=LONG if case.dtypes[0] != BF16 else sums)
    monkeypatch.setattr(kernels, "fills", lambda *_: True)
    monkeypatch.setattr(kernels, "merged", lambda types, tokens, routes, *_: how._replace(routes=routes))
    monkeypatch.setattr(kernels, "paired", lambda *_: None)
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: (1, 0))
    check_walks(case, "walk_merged", monkeypatch)


@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize("case", paired(), ids=str)
def test_two_routes_share_a_warp(
    case: Case, turns: int, poisoned: None, many_sequences: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = kernels.Paired(case.rank, turns)
    if gpu.capability(0) < (9, 0) or nvrtc.shared_limit(0) < how.shared(case.tokens):
        pytest.skip("the kernel needs compute capability 9.0, or more shared memory than this GPU has")
    monkeypatch.setattr(kernels, "fills", lambda *_: True)
    monkeypatch.setattr(kernels, "merged", lambda *_: kernels.Merged(1, 2, 1, 8, rank=case.rank, sums=SHORT))
    monkeypatch.setattr(kernels, "paired", lambda *_: how)
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: (1, 0))
    check_walks(case, "walk_paired", monkeypatch)


def many() -> list[Case]:
    """Scans to be taken in one piece, as where sequences are many; few go in segments."""
    found = [
        Case(channels=channels, states=states, order="cross", dtypes=(dtype,) * 4, rank=rank, grid=(5, 11))
        for states in (2, 4, 8, 16, 24, 32, 64, 100, 256)
        for channels, rank, dtype in ((96, 0, BF16), (72, 24, BF16), (64, 5, F16), (64, 12, F32), (40, 0, F32))
    ]
    found += [
        Case(channels=channels, states=16, rank=rank, state=True, dtypes=(dtype,) * 4)
        for dtype in (BF16, F16, F32)
        for channels, rank in ((64, 48), (20, 7))
    ]
    return [*found, Case(channels=80, states=16, dtypes=(BF16, BF16, F32, BF16), out_dtype=F32, grid=(1, 40))]


@pytest.mark.parametrize("case", many(), ids=str)
def test_routes_in_one_piece(case: Case, poisoned: None, many_sequences: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: (1, 0))
    found = run(make_call(case, device="cuda"), "cuda")
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)


def plentiful() -> list[Case]:
    """Scans whose blocks are made as for many sequences, or as for few."""
    half = (BF16,) * 4
    found = [
        Case(channels=channels, states=16, order=order, rank=rank, dtypes=(dtype,) * 4, grid=grid, state=True)
        for order, grid in (("cross", (5, 13)), ("bidirectional", (1, 9)))
        for channels, rank, dtype in ((64, 0, BF16), (72, 24, BF16), (64, 6, BF16), (20, 5, F16), (40, 0, F32))
    ]
    found += [
        Case(channels=channels, states=16, order="cross", rank=24, dtypes=types, grid=(5, 13), state=True)
        for channels, types in ((64, (F16,) * 4), (72, (F32,) * 4), (72, (BF16, F16, F16, BF16)))
    ]
    found += [Case(channels=128, states=9, order="cross", dtypes=half, grid=(14, 14), batch=3)]
    return [*found, Case(channels=80, states=16, dtypes=(BF16, BF16, F32, BF16), out_dtype=F32, grid=(1, 40))]


@pytest.mark.parametrize("routes", ["together", "in turn", "in order", "in segments", "in long segments"])
@pytest.mark.parametrize("blocks", ["few", "many", "lean", "few going back"])
@pytest.mark.parametrize("case", plentiful(), ids=str)
def test_blocks_of_many_sequences(
    case: Case,
    blocks: str,
    routes: str,
    poisoned: None,
    many_sequences: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = []
    many, lean, wide = blocks != "few", blocks == "lean", kernels.wide_backward
    monkeypatch.setattr(kernels, "wide_backward", lambda *how, **types: launched.append(how) or wide(*how, **types))
    monkeypatch.setattr(wide_cuda, "_forward_tile", lambda call, _: kernels.forward_tiles(call.states)[many])
    monkeypatch.setattr(wide_cuda, "_in_turn", lambda *_: routes == "in turn")
    monkeypatch.setattr(wide_cuda, "_in_order", lambda *_: routes == "in order")
    monkeypatch.setattr(kernels, "LEAN", lean)
    monkeypatch.setattr(kernels, "MANY", 0)
    if many:  # so that blocks add to what others have left, and if they are lean take channels in turn
        monkeypatch.setattr(gpu, "multiprocessors", lambda _: 1)
        if not lean:
            monkeypatch.setattr(kernels, "wide_items", lambda _, batch, *__: batch)
    tiles = (case.grid[0] * case.grid[1] + 15) // 16
    segments = (tiles, 1) if "segments" in routes else (1, tiles)
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: segments)
    if "long" in routes:
        monkeypatch.setattr(kernels, "LONG", 1)
    if blocks == "few going back":  # from states that are saved four tiles apart
        monkeypatch.setattr(few, "takes", lambda *_: False)
        monkeypatch.setattr(few, "takes_call", takes_call)
    found = run(make_call(case, device="cuda"), "cuda")
    assert launched or blocks == "few going back"
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)
    again = run(make_call(case, device="cuda"), "cuda")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("raw", [-80.0, 80.0])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("states", [1, 16])
def test_extreme_step_sizes(raw: float, dtype: torch.dtype, states: int) -> None:
    call = make_call(Case(dtypes=(dtype,) * 4, states=states, order="cross"), device="cuda")
    call = call._replace(dt=torch.full_like(call.dt, raw), D=None)
    found, reference = run(call, "cuda"), run(cases.double(call), "reference")
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), name
        tiny = torch.finfo(tensor.dtype).smallest_normal * tensor.numel() ** 0.5
        if reference[name].abs().max() > 1e3 * tiny:
            assert_close(name, tensor, reference[name])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("states", [1, 16])
def test_edge_of_the_type_gives_no_nan(dtype: torch.dtype, states: int) -> None:
    call = make_call(Case(dtypes=(dtype,) * 4, out_dtype=F32, states=states, skip=False), device="cuda")
    call = call._replace(x=call.x.sign() * 6e4, dt=torch.full_like(call.dt, 10.0), B=call.B * 0.01, C=call.C * 0.01)
    assert_close("y", run(call, "cuda")["y"], run(cases.double(call), "reference")["y"])
    call = call._replace(x=call.x / 6e4, dt=call.dt.sign() * 6e4)
    assert not any(tensor.isnan().any() for tensor in run(call, "cuda").values())


@pytest.mark.parametrize("states", [1, 16, 64])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bitwise_deterministic(states: int, dtype: torch.dtype) -> None:
    case = Case(order="cross", rank=4, states=states, channels=200, batch=5, grid=(14, 14), dtypes=(dtype,) * 4)
    call = make_call(case, device="cuda")
    first = run(call, "cuda")
    for _ in range(20):
        for name, tensor in run(call, "cuda").items():
            assert torch.equal(tensor, first[name]), name


def test_tokens_off_a_route_get_nothing_from_it(poisoned: None) -> None:
    table = torch.tensor([[4, -1, 0, -1], [-1, -1, -1, -1]], dtype=torch.int32, device="cuda")
    for states in (1, 16):
        call = make_call(Case(merge=False, batch=1, states=states), device="cuda")._replace(indices=table)
        found, reference = run(call, "cuda"), run(cases.double(call), "reference")
        for name in found:
            assert_close(name, found[name], reference[name])
        visited = torch.zeros(35, 2, dtype=torch.bool)
        visited[[4, 0], 0] = True
        assert (found["y"][0][~visited] == 0).all()


@pytest.mark.parametrize("states", [1, 16])
def test_one_output_alone_in_the_loss(states: int) -> None:
    call = make_call(Case(state=True, states=states, order="cross"), device="cuda")
    reference = cases.double(call)
    for which in (0, 1):
        gradients = []
        for chosen, name in ((reference, "reference"), (call, "cuda")):
            x = chosen.x.detach().requires_grad_()
            torch.ops.vision_mamba.cross_selective_scan(*chosen._replace(x=x), name)[which].square().sum().backward()
            gradients.append(x.grad)
        assert_close("dx", gradients[1], gradients[0])


def test_empty_batch() -> None:
    found = run(make_call(Case(batch=0, order="cross", rank=3, state=True), device="cuda"), "cuda")
    assert found["y"].shape == (0, 35, 20)
    assert all((found[f"d{name}"] == 0).all() for name in GRADIENTS)


@pytest.mark.parametrize("states", [1, 16])
def test_graph_capture_and_another_stream(states: int) -> None:
    call = make_call(Case(order="cross", states=states, channels=64, dtypes=(BF16,) * 4), device="cuda")
    want = run(call, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(call, "cuda")
    stream.synchronize()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    graph = torch.cuda.CUDAGraph()
    leaves = call._replace(**{n: getattr(call, n).clone().requires_grad_() for n in ("x", "dt")})
    dy = torch.randn_like(want["y"])
    with torch.cuda.graph(graph):
        y, _ = torch.ops.vision_mamba.cross_selective_scan(*leaves, "cuda")
        gradients = torch.autograd.grad(y, (leaves.x, leaves.dt), dy)
    with torch.no_grad():
        leaves.x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    again, _ = torch.ops.vision_mamba.cross_selective_scan(*leaves, "cuda")
    assert torch.equal(y, again)
    expected_gradients = torch.autograd.grad(again, (leaves.x, leaves.dt), dy)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected_gradients, strict=True))


def test_compiles_to_one_graph() -> None:
    call = make_call(Case(order="cross", states=16, rank=4, channels=64, dtypes=(BF16,) * 4), device="cuda")

    def loss(x: Tensor, dt: Tensor) -> Tensor:
        y, _ = torch.ops.vision_mamba.cross_selective_scan(*call._replace(x=x * 2, dt=dt))
        return y.float().square().mean()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, mode="reduce-overhead")):
        for _ in range(3):  # the third run of the compiled one replays a graph
            x, dt = call.x.clone().requires_grad_(), call.dt.clone().requires_grad_()
            function(x, dt).backward()
        found.append((x.grad, dt.grad))
    for eager, compiled in zip(*found, strict=True):
        assert_close("gradient", compiled, eager)


def test_classic_layout() -> None:
    u, delta, z = (torch.randn(2, 96, 197, device="cuda", dtype=BF16) for _ in range(3))
    A = -torch.rand(96, 16, device="cuda")
    B, C = (torch.randn(2, 16, 197, device="cuda", dtype=BF16) for _ in range(2))
    y = ops.selective_scan(u, delta, A, B, C, torch.ones(96, device="cuda"), z, delta_softplus=True, backend="cuda")
    wide = [t.double().cpu() for t in (u, delta, A, B, C)]
    want = ops.selective_scan(*wide, torch.ones(96).double(), z.double().cpu(), delta_softplus=True)
    assert_close("y", y, want)


def test_it_is_the_first_choice() -> None:
    call = make_call(Case(states=16), device="cuda")
    assert ops.registry.choose(call, None).name == "cuda"
    assert "float64" in str(cuda.BACKEND.refuses(call._replace(x=call.x.double())))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_the_second_device_while_the_first_is_current() -> None:
    case = Case(order="cross", states=16, channels=64)
    here, there = (run(make_call(case, device=f"cuda:{i}"), "cuda") for i in (0, 1))
    assert all(torch.equal(here[name].cpu(), tensor.cpu()) for name, tensor in there.items())
    assert torch.cuda.current_device() == 0
