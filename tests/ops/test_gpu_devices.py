"""Where kernels run: on the device of their tensors, on the current stream, in a CUDA graph, below a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import BF16, Case
from tests.ops import ssd_cases
from tests.ops.ssd_cases import SsdCase
from tests.tolerances import assert_close
from vision_mamba import ops
from vision_mamba.ops import autograd, ssd_call
from vision_mamba.ops import call as scan_call
from vision_mamba.ops.backends import calls_cuda, forward_cuda, nvrtc
from vision_mamba.scans import ScanOrder, reverse, row_major
from vision_mamba.scans import order as scan_orders

pytestmark = pytest.mark.gpu

FIRST = torch.device("cuda", 0)


class Work(NamedTuple):
    """Something to differentiate: a function, and the tensors on which it depends."""

    function: Callable[..., tuple[Tensor, ...]]
    inputs: list[Tensor]

    def to(self, device: torch.device) -> Work:
        return Work(self.function, [t.to(device) for t in self.inputs])


def _scan(backend: str, case: Case) -> Work:
    call = cases.make_call(case)
    tables = [call.indices if call.indices is None else call.indices.cuda(i) for i in range(torch.cuda.device_count())]
    names = [name for name in scan_call.GRADIENTS if getattr(call, name) is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = call._replace(indices=tables[tensors[0].device.index or 0], **dict(zip(names, tensors, strict=True)))
        y, last = torch.ops.vision_mamba.cross_selective_scan(*given, backend)
        return (y, last) if call.return_last_state else (y,)

    return Work(function, [getattr(call, name) for name in names])


def _ssd(case: SsdCase) -> Work:
    call = ssd_cases.make_call(case)
    names = [name for name in ssd_call.GRADIENTS if getattr(call, name) is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.vision_mamba.ssd(*call._replace(**dict(zip(names, tensors, strict=True))), "triton")[:1]

    return Work(function, [getattr(call, name) for name in names])


def _several(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Work:
    def tupled(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(*tensors)
        return found if isinstance(found, tuple) else (found,)

    return Work(tupled, list(inputs))


HALF = (BF16,) * 4
SCANS: dict[str, Callable[[], Work]] = {
    f"{backend}_{name}": lambda backend=backend, case=case: _scan(backend, case)  # type: ignore[misc]
    for backend in ("cuda", "triton")
    for name, case in {
        "n1": Case(order="cross", states=1, rank=4, channels=64, dtypes=HALF),
        "n16": Case(order="bidirectional", states=16, rank=4, channels=64, dtypes=HALF, state=True),
        "long": Case(grid=(1, 900), routes=1, batch=1, states=16, channels=32, dtypes=HALF),
    }.items()
}
SCANS["ssd"] = lambda: _ssd(SsdCase(routes=2, descending=1, heads=4, groups=1, channels=16, states=16, dtypes=HALF))
WORKS = SCANS | {
    "normed": lambda: _several(ops.normed, torch.randn(3, 9, 96), torch.rand(96), torch.randn(96)),
    "add_normed": lambda: _several(
        ops.add_normed, torch.randn(3, 9, 96), torch.randn(3, 9, 96).bfloat16(), torch.rand(96), torch.randn(96)
    ),
    "conv_both_ways": lambda: _several(
        ops.conv_both_ways, torch.randn(2, 50, 64), torch.randn(2, 64, 4), torch.randn(2, 64)
    ),
    "conv_along": lambda: _several(
        functools.partial(ops.conv_along, before=2), torch.randn(2, 50, 64), torch.randn(64, 1, 4), torch.randn(64)
    ),
    "gated": lambda: _several(ops.gated, torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 5, 64).bfloat16()),
}


def differentiate(work: Work) -> list[Tensor]:
    """Outputs and gradients for ones, all by name of their place."""
    leaves = [t.detach().requires_grad_() for t in work.inputs]
    outputs = work.function(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a.cpu(), b.cpu()), f"output or gradient {i}"


@pytest.fixture(params=WORKS)
def work(request: pytest.FixtureRequest) -> Work:
    """On the CPU."""
    return WORKS[request.param]()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_device_while_the_first_is_current(work: Work) -> None:
    there = differentiate(work.to(torch.device("cuda", 1)))
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in there)
    assert_equal(there, differentiate(work.to(FIRST)))
    assert torch.cuda.current_device() == 0


def test_on_the_current_stream(work: Work) -> None:
    """The inputs are written late on a stream of their own: whoever reads them on another one reads NaN."""
    work = work.to(FIRST)
    expected = differentiate(work)
    late = [torch.full_like(t, float("nan")) for t in work.inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(40_000_000)
        for target, t in zip(late, work.inputs, strict=True):
            target.copy_(t)
        found = differentiate(Work(work.function, late))
    stream.synchronize()
    assert_equal(found, expected)


def test_in_a_graph(work: Work) -> None:
    work = work.to(FIRST)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        differentiate(work)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(work)
    for _ in range(2):
        work.inputs[0].mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, differentiate(work))


@pytest.mark.parametrize("name", ["cuda_n1", "cuda_n16", "triton_n1", "triton_n16", "ssd"])
def test_compiled_with_reduced_overhead(name: str) -> None:
    work = SCANS[name]().to(FIRST)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * y for y in work.function(tensors[0] * 2, *tensors[1:]))

    expected = differentiate(Work(function, work.inputs))
    compiled = Work(torch.compile(function, fullgraph=True, mode="reduce-overhead"), work.inputs)
    for _ in range(3):  # the third run replays a graph
        found = [t.clone() for t in differentiate(compiled)]
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"output or gradient {i}", a, b)


@pytest.mark.parametrize("mode", ["global", "thread_local"])
@pytest.mark.parametrize("states", [1, 16])
def test_in_a_graph_from_the_first_call_on(states: int, mode: str) -> None:
    """Tables are brought to the device and kernels loaded beside a capture, and stay what the graph reads."""
    call = cases.make_call(Case(grid=(3, 5 + states), routes=2, states=states, channels=40, dtypes=HALF), device="cuda")
    scan, order = torch.ops.vision_mamba.cross_selective_scan, ScanOrder("twice", (reverse(row_major), row_major))
    nvrtc.kernel.cache_clear()
    forward_cuda.runners.clear()
    autograd.operator.known.clear()

    def run() -> tuple[Tensor, Tensor]:
        along = order.indices(3, 5 + states, device="cuda")
        return scan(*call, "cuda")[0], scan(*call._replace(indices=along), "cuda")[0]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        captured = run()
    for tables in (calls_cuda.tables_in_order, scan_orders._tables):
        tables._kept.clear()
    others = [torch.full((2, 3 * (5 + states)), 7, dtype=torch.int32, device="cuda") for _ in range(64)]
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(list(captured), list(run()))
    assert len(others) == 64  # what would have got a table's memory, had it been forgotten
