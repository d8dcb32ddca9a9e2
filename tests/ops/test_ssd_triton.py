"""The Triton backend of the state-space dual scan: under the interpreter, its refusals, and on a GPU all cases."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops import ssd_cases
from tests.ops.ssd_cases import BF16, F16, F32, F64, SsdCase, make_call, run
from tests.tolerances import RELATIVE_RMS, relative_rms
from vision_mamba.ops import BackendError
from vision_mamba.ops.backends import ssd_triton
from vision_mamba.ops.ssd_operator import registry

HERE = Path(__file__).parent
GPU_CASES = ssd_cases.options() + ssd_cases.shapes() + ssd_cases.types() + ssd_cases.layouts()
WIDE = [
    SsdCase(channels=192, states=16, heads=2, groups=1, dtypes=(BF16,) * 4, grid=(1, 70)),
    SsdCase(channels=130, states=5, skip="channels", state=True, routes=2, descending=1, heads=2, groups=2),
    SsdCase(channels=128, states=129, heads=2, groups=1, state=True, grid=(1, 40)),
]
TILES = [(dtype, states, 64) for dtype in (BF16, F16, F32) for states in (16, 64, 128, 256)]
TILES += [(BF16, states, channels) for states in (16, 64, 128) for channels in (16, 32)]
TILES += [(F32, states, channels) for states in (16, 32, 64, 128) for channels in (16, 32)]


def gpu() -> torch.device:
    return torch.device(torch.accelerator.current_accelerator().type, 0)


def assert_matches(case: SsdCase) -> None:
    """To the bound of the type of the factors, or of the result where that is coarser."""
    call = make_call(case, device=gpu())
    types = {call.x.dtype, call.B.dtype, call.C.dtype}
    factors = next(dtype for dtype in (F32, F16, BF16) if dtype in types)
    found, reference = run(call, "triton"), run(ssd_cases.double(make_call(case)), "reference")
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        bound, error = max(RELATIVE_RMS[factors], RELATIVE_RMS[found[name].dtype]), relative_rms(found[name], tensor)
        assert error <= bound, f"{name}: {error:.2e} is over {bound:.0e}"


def test_kernels_under_the_interpreter() -> None:
    """In a process of its own, since Triton decides at import whether to interpret."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "ssd_triton_interpreted.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        command, env=environment, cwd=HERE.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert outcome.returncode == 0, outcome.stdout[-8000:]


def test_says_why_it_can_not_run() -> None:
    with pytest.raises(BackendError, match=r"ssd: backend 'triton' refuses this call: its tensors are on cpu"):
        run(make_call(SsdCase()), "triton")
    assert "float64" in str(ssd_triton.BACKEND.refuses(make_call(SsdCase(dtypes=(F64,) * 4))))
    assert ssd_triton.BACKEND.refuses(make_call(SsdCase(channels=300, states=256, grid=(1, 2), heads=2))) is None


def test_wide_heads_are_run_in_parts() -> None:
    """Equal parts, as few as fit into a processor."""
    for channels, states, dtype, parts in [(128, 256, BF16, 1), (129, 3, BF16, 3), (384, 3, F32, 3), (131, 3, F32, 131),
                                           (65, 129, F32, 5), (128, 129, F32, 2), (65, 129, BF16, 1)]:  # fmt: skip
        case = SsdCase(channels=channels, states=states, grid=(1, 2), heads=1, groups=1, dtypes=(dtype,) * 4)
        assert ssd_triton.parts_of(make_call(case)) == parts


class Compiled:
    """In place of a kernel: what it is launched with is compiled for a GPU, which need not be there."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **keywords: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.compiler import compile as build

        options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
        given = inspect.signature(self.kernel.fn).bind(*arguments, **keywords).arguments
        constants = {
            n: v for n, v in given.items() if v is None or "constexpr" in str(self.kernel.fn.__annotations__.get(n))
        }
        kinds = {int: "i32", float: "fp32", F32: "*fp32", BF16: "*bf16"}
        signature = {
            n: "constexpr" if n in constants else kinds[v.dtype if isinstance(v, torch.Tensor) else type(v)]
            for n, v in given.items()
        }
        build(ASTSource(self.kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)


class Skipped:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: None


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [(F32, ("prepare", "forward", "states", "inputs", "weights", "rates")), (BF16, ("states", "inputs"))],
    ids=str,
)
def test_kernels_compile(dtype: torch.dtype, chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler refuses some of what the interpreter runs."""
    pytest.importorskip("triton")
    from vision_mamba.ops.backends import ssd_triton_backward_kernels, ssd_triton_kernels

    for module, names in (
        (ssd_triton_kernels, ("prepare", "forward", "states")),
        (ssd_triton_backward_kernels, ("inputs", "weights", "rates")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Compiled(getattr(module, name)) if name in chosen else Skipped())
    for tables in (ssd_triton.FORWARD, ssd_triton.BACKWARD):
        for bits in (16, 32):
            monkeypatch.setitem(tables, bits, {(256, 128): ssd_triton.Tile(16, 16)})
    ssd_triton._plan.cache_clear()
    call = make_call(SsdCase((1, 20), 1, 1, 16, 1, 16, dtypes=(dtype,) * 4))
    ssd_triton._forward(call, True)
    ssd_triton._backward(call, call.x.new_empty(0), torch.zeros_like(call.x), None)
    ssd_triton._plan.cache_clear()


@pytest.mark.parametrize("steps", [1, 5, 64, 197, 16384])
@pytest.mark.parametrize("batch", [1, 128])
def test_a_plan_covers_the_route(steps: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step in a chunk, no segment without one, and few segments where there is much to do."""
    monkeypatch.setattr(ssd_triton, "_processors", lambda device: 132)
    ssd_triton._plan.cache_clear()
    for backward in (False, True):
        sizes = ssd_triton.Sizes(batch, steps, 6, 64, 1, 64, None, True, "bfloat16", torch.device("cpu"))
        plan = ssd_triton._plan(backward, sizes)
        chunks = -(-steps // plan.tile.steps)
        assert plan.segments * plan.chunks >= chunks > (plan.segments - 1) * plan.chunks
        assert plan.padded == plan.segments * plan.chunks * plan.tile.steps >= steps
        assert batch == 1 or plan.segments == 1
    ssd_triton._plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES + WIDE, ids=str)
def test_matches_the_reference(case: SsdCase, poisoned: None) -> None:
    assert_matches(case)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "states", "channels"), TILES, ids=str)
def test_every_tile(dtype: torch.dtype, states: int, channels: int, poisoned: None) -> None:
    assert_matches(SsdCase(dtypes=(dtype,) * 4, states=states, channels=channels, grid=(1, 200), groups=1, heads=6))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("channels", "states"), [(5, 16), (64, 16), (64, 64)])
def test_bitwise_deterministic(channels: int, states: int, dtype: torch.dtype) -> None:
    size = dict(heads=6, channels=channels, groups=1, states=states, grid=(14, 14))
    call = make_call(SsdCase(routes=2, descending=1, dtypes=(dtype,) * 4, **size), device=gpu())  # type: ignore
    first = run(call, "triton")
    for _ in range(10):
        for name, tensor in run(call, "triton").items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.gpu
def test_long_and_alone() -> None:
    """One sequence, cut into segments."""
    assert_matches(SsdCase(grid=(1, 2500), batch=1, heads=2, groups=1, channels=32, states=32, dtypes=(BF16,) * 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("shape", [(2, 196, 12, 64, 64), (1, 16384, 4, 64, 128)], ids=str)
def test_sizes_of_models(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Small steps, so that states last long and the gradients of A, D and the bias sum many terms that cancel."""
    batch, tokens, heads, channels, states = shape
    case = SsdCase((1, tokens), batch, heads, channels, 1, states, dtypes=(dtype,) * 4)
    call = make_call(case, device=gpu())
    call = call._replace(dt=call.dt - 2, dt_bias=0.1 * call.dt_bias)  # type: ignore[operator]
    found, exact = run(call, "triton"), run(ssd_cases.double(call), "eager")
    for name, tensor in exact.items():
        assert relative_rms(found[name], tensor) <= max(RELATIVE_RMS[dtype], RELATIVE_RMS[found[name].dtype]), name
        if name in ("dA", "dD", "ddt_bias"):
            assert relative_rms(found[name], tensor) <= 2e-4, f"{name}: the rounding of states adds up"


@pytest.mark.gpu
def test_more_than_32_bits_of_elements() -> None:
    """x, y and their gradients of 2^31 elements and more: the last batch item is the first, which is as by itself."""
    case = SsdCase(batch=1, grid=(1, 3136), heads=16, groups=1, channels=64, states=16, dtypes=(BF16,) * 4)
    call = make_call(case, device=gpu())
    batch = 2**31 // call.x.numel() + 1
    dy = torch.randn_like(call.x)
    names = ("x", "dt", "B", "C")

    def results(items: int) -> list[torch.Tensor]:
        wide = {n: (t := getattr(call, n)).repeat(items, *[1] * (t.dim() - 1)).requires_grad_() for n in names}
        y, _ = torch.ops.vision_mamba.ssd(*call._replace(**wide), "triton")
        return [y.detach(), *torch.autograd.grad(y, list(wide.values()), dy.expand_as(y))]

    assert batch * call.x.numel() > 2**31
    for name, found, alone in zip(("y", *names), results(batch), results(1), strict=True):
        assert torch.equal(found[-1], found[0]), name
        assert relative_rms(found[:1], alone) <= RELATIVE_RMS[BF16], name


@pytest.mark.gpu
def test_runs_in_a_graph() -> None:
    call = make_call(SsdCase(states=16, routes=2, descending=1), device=gpu())
    scan = torch.ops.vision_mamba.ssd
    scan(*call, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scan(*call, "triton")[0]
    call.x.neg_()
    graph.replay()
    assert torch.equal(captured, scan(*call, "triton")[0])


@pytest.mark.gpu
def test_is_what_runs_on_a_gpu() -> None:
    assert registry.choose(make_call(SsdCase(), device=gpu()), None).name == "triton"
