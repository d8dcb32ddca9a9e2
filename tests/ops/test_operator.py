"""The operators as the rest of torch sees them: opcheck, compile, export, scripting, fx, meta, autocast, FLOPs."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import BF16, F32, Case, make_call, run
from vision_mamba import ops, scans
from vision_mamba.ops import disk_caches, registry
from vision_mamba.ops.autograd import scan_flops
from vision_mamba.ops.call import GRADIENTS, ScanCall

scan = torch.ops.vision_mamba.cross_selective_scan
BACKENDS = ("cpu", "eager")
WITH_FIXED_SIZES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def watched(call: ScanCall) -> ScanCall:
    return call._replace(**{n: getattr(call, n).requires_grad_() for n in GRADIENTS if getattr(call, n) is not None})


OPTIONS = [
    Case(order="local_2", rank=3),
    Case(shared_x=False, merge=False, state=True, skip=False, bias=False),
    Case(shared_x=False, layout="channels_first", dtypes=(BF16, F32, BF16, F32)),
    Case(shared_x=False, merge=False, layout="channels_first", out_dtype=BF16),
    Case(layout="sliced", merge=False, softplus=False),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_opcheck(case: Case, backend: str) -> None:
    arguments = (*watched(make_call(case)), backend)
    # Traced as plain torch, sizes that vary take thousands of guards: there on few tokens, below.
    sizes = ("test_aot_dispatch_dynamic",) if registry.get(backend).backward is not None else ()
    # Two runs of a bfloat16 scan differ by nothing; opcheck compares them with the tolerance of their type.
    torch.library.opcheck(scan.default, arguments, test_utils=(*WITH_FIXED_SIZES, *sizes))
    forward = torch.ops.vision_mamba.cross_selective_scan_forward.default
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(forward, plain, test_utils=("test_schema", "test_faketensor"))
    if registry.get(backend).backward is not None:
        y, last, saved = forward(*plain)
        gradients = (saved, torch.randn_like(y), torch.randn_like(last) if case.state else None)
        backward = torch.ops.vision_mamba.cross_selective_scan_backward.default
        torch.library.opcheck(backward, (*gradients, *plain), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_opcheck_of_plain_torch_for_any_size(case: Case) -> None:
    arguments = (*watched(make_call(replace(case, grid=(1, 2)))), "eager")
    torch.library.opcheck(scan.default, arguments, test_utils=("test_aot_dispatch_dynamic",))


@pytest.mark.parametrize("order", scans.names())
def test_opcheck_of_the_table(order: str) -> None:
    for grid in ((3, 5), (4, 4)):
        torch.library.opcheck(torch.ops.vision_mamba.scan_indices.default, (torch.zeros(1), order, *grid))
    torch.library.opcheck(torch.ops.vision_mamba.scan_indices.default, (torch.zeros(1), order, 3, 5, 7))


class Mixer(nn.Module):
    """The least that a model does with the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(6, 4 * (2 + 2 * 3))
        self.A_log = nn.Parameter(torch.zeros(4, 6, 3))
        self.dt_weight = nn.Parameter(torch.randn(4, 6, 2))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, D = x.shape
        x = x.reshape(B, H * W, D)
        dt, b, c = self.weights(x).view(B, H * W, 4, 8).split([2, 3, 3], dim=-1)
        table = torch.ops.vision_mamba.scan_indices(x, "cross", H, W)
        A = -torch.exp(self.A_log.float())
        y = torch.ops.vision_mamba.cross_selective_scan(x, dt, A, b, c, None, table, self.dt_weight)[0]
        return y.view(B, H, W, D)


@pytest.fixture
def mixer() -> Mixer:
    return Mixer()


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(module(x).square().sum(), list(module.parameters())))


@pytest.mark.parametrize(("backend", "compiler"), [("cpu", "inductor"), ("eager", "aot_eager")])
def test_compiles_to_one_graph(mixer: Mixer, backend: str, compiler: str) -> None:
    x = torch.randn(2, 3, 5, 6)
    compiled = torch.compile(mixer, fullgraph=True, backend=compiler)
    with ops.use_backend(backend):
        torch.testing.assert_close(compiled(x), mixer(x))
        for found, expected in zip(gradients(compiled, x), gradients(mixer, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_compiles_for_any_size(mixer: Mixer) -> None:
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 3, 5), (1, 4, 7), (3, 2, 2)):
        x = torch.randn(*size, 6)
        torch.testing.assert_close(compiled(x), mixer(x))
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exports_for_any_size(mixer: Mixer, strict: bool) -> None:
    sizes = {axis: torch.export.Dim(name, min=2, max=64) for axis, name in enumerate(("batch", "height", "width"))}
    program = torch.export.export(mixer, (torch.randn(2, 3, 5, 6),), dynamic_shapes={"x": sizes}, strict=strict)
    x = torch.randn(3, 6, 4, 6)
    torch.testing.assert_close(program.module()(x), mixer(x))
    nodes = [node.target for node in program.graph.nodes]
    assert nodes.count(scan.default) == 1  # one node, whatever the length


def test_scripts_and_traces(mixer: Mixer, tmp_path) -> None:
    x = torch.randn(2, 3, 5, 6)
    scripted = torch.jit.script(mixer)
    scripted.save(tmp_path / "mixer.pt")
    for copy in (scripted, torch.jit.load(tmp_path / "mixer.pt"), torch.fx.symbolic_trace(mixer)):
        torch.testing.assert_close(copy(x), mixer(x))
        for found, expected in zip(gradients(copy, x), gradients(mixer, x), strict=True):
            torch.testing.assert_close(found, expected)


def test_runs_on_meta(mixer: Mixer) -> None:
    y = mixer.to("meta")(torch.randn(2, 3, 5, 6, device="meta"))
    assert y.is_meta and y.shape == (2, 3, 5, 6)
    y.sum().backward()
    assert mixer.A_log.grad is not None and mixer.A_log.grad.is_meta


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_no_bit(backend: str) -> None:
    call = make_call(Case(order="cross", rank=4, states=16))
    expected = run(call, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(call, backend)
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def test_inference_mode_and_no_grad_give_the_same() -> None:
    call = make_call(Case(order="cross", states=16))
    expected = scan(*watched(call))[0]
    with torch.no_grad():
        assert torch.equal(scan(*call)[0], expected)
    with torch.inference_mode():
        assert torch.equal(scan(*call)[0], expected)


@pytest.mark.parametrize("name", ["x", "A"])
def test_what_torch_has_not_computed_yet_is_seen(name: str) -> None:
    """A negation that only a bit of the tensor tells of, and a zero without memory."""
    call = make_call(Case(order="cross"))
    value = getattr(call, name)
    negation, zero = torch._neg_view(-value), torch._efficientzerotensor(value.shape)
    assert torch.equal(scan(*call._replace(**{name: negation}))[0], scan(*call)[0])
    assert torch.equal(
        scan(*call._replace(**{name: zero}))[0], scan(*call._replace(**{name: torch.zeros_like(value)}))[0]
    )
    expected = run(call, "cpu")
    for result, tensor in run(call._replace(**{name: negation}), "cpu").items():
        assert torch.equal(tensor, expected[result]), result
    seed, y = torch.randn(2, 35, 20), scan(*watched(call))[0]
    grads = [torch.autograd.grad(y, call.x, s, retain_graph=True)[0] for s in (torch._neg_view(seed), -seed)]
    assert torch.equal(*grads)


def test_forward_mode_is_taken_by_plain_torch_and_refused_by_kernels() -> None:
    call = make_call(Case(dtypes=(torch.float64,) * 4))
    tangent = torch.randn_like(call.x)

    def at(x: Tensor, backend: str) -> Tensor:
        return scan(*call._replace(x=x), backend)[0]

    for backend in ("eager", "reference"):
        _, found = torch.func.jvp(lambda x: at(x, backend), (call.x,), (tangent,))  # noqa: B023
        step = 1e-6 * tangent
        torch.testing.assert_close(found, (at(call.x + step, backend) - at(call.x - step, backend)) / 2e-6)
    narrow = make_call(Case())
    with forward_ad.dual_level():
        assert scan(*narrow)[0].shape == (2, 35, 20)  # where nothing has a tangent nothing is lost
        x = forward_ad.make_dual(narrow.x, torch.ones_like(narrow.x))
        with pytest.raises(RuntimeError, match=r"forward-mode derivatives are .*use_backend\('eager'\)"):
            scan(*narrow._replace(x=x))


def test_frozen_arguments_get_no_gradient() -> None:
    call = make_call(Case())
    x = call.x.requires_grad_()
    scan(*call._replace(x=x))[0].sum().backward()
    assert x.grad is not None and call.dt.grad is None and call.A.grad is None


def test_flops_are_counted_forward_and_backward() -> None:
    call = make_call(Case(grid=(4, 4), order="cross", rank=5, states=16, batch=2, channels=8))
    forward = 2 * 16 * 4 * 8 * (9 * 16 + 1 + 2 * 5)
    assert scan_flops(call.x.shape, call.dt.shape, call.A.shape, call.indices.shape, call.dt_weight.shape) == forward
    with FlopCounterMode(display=False) as counter:
        scan(*call)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        scan(*watched(call))[0].sum().backward()
    assert counter.get_total_flops() == 4 * forward


def test_a_slow_backend_is_said_once_with_the_fix(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_announced", set())
    call = make_call(Case(dtypes=(torch.float64,) * 4))  # a type that no kernel takes
    with caplog.at_level(logging.INFO, logger="vision_mamba"):
        scan(*call)
        scan(*call)
        scan(*make_call(Case()))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "'eager'" in warnings[0].getMessage() and "python -m vision_mamba.doctor" in warnings[0].getMessage()
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [
        "selective scan on cpu: backend 'cpu'"
    ]


def test_caches_on_disk_know_what_decides_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for another backend, or by another version, is not taken for what is asked for."""
    call = make_call(Case(grid=(1, 3), states=2))

    def found() -> bool:
        """Whether a cache had it."""
        torch.compiler.reset()
        counters.clear()
        with torch.no_grad():
            torch.compile(lambda x: scan(x, *call[1:])[0])(call.x)
        hits, misses = (counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss"))
        assert hits + misses == 1
        return bool(hits)

    # Not by monkeypatch, which in some versions deletes a module's attribute instead of restoring it.
    with torch.compiler.config.patch(cache_key_tag="mine"), fresh_cache():
        assert not found() and found()
        monkeypatch.setattr(disk_caches, "_decisive", lambda forced: f"another version, {forced}")
        with ops.use_backend("eager"):
            assert not found()
        assert torch.compiler.config.cache_key_tag == "mine vision_mamba-another version, eager"
    torch.compiler.reset()


def test_a_tag_is_brought_up_to_date_in_every_thread() -> None:
    """Where each of them has its own, it is told of the last backend alone, beside what others say there."""
    tags = []

    def chosen(name: str) -> None:
        with ops.use_backend(name):
            disk_caches._bring_up_to_date()
        tags.append(torch.compiler.config.cache_key_tag)

    with ThreadPoolExecutor(1) as thread, torch.compiler.config.patch(cache_key_tag="mine"):
        for name in ("cpu", "eager", "cpu"):
            thread.submit(chosen, name).result()
            chosen("reference")
            torch.compiler.config.cache_key_tag += " yours"
    assert all(tag.count("vision_mamba-") == 1 for tag in tags)
    marks = [tag.partition("vision_mamba-")[2].split()[0] for tag in tags]
    assert marks[0] == marks[4] and len(set(marks)) == 3 and len(set(marks[1::2])) == 1
    assert [tag.count("yours") for tag in tags[1::2]] == [0, 1, 2] and tags[1].startswith("mine")


def test_what_decides_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    decisive = disk_caches._decisive.__wrapped__
    before = [decisive(None), decisive("cpu")]
    backend = registry.get("cpu")
    monkeypatch.setitem(registry.scans.backends, "cpu", replace(backend, keeps="lean"))
    before.append(decisive(None))
    monkeypatch.setitem(registry.scans.backends, "cpu", replace(backend, unavailable=lambda device: "it is gone."))
    before.append(decisive(None))
    monkeypatch.setattr(disk_caches, "__file__", __file__)
    assert len({*before, decisive(None)}) == 5
