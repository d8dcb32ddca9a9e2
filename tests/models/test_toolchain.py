"""Every family under torch's tools: TorchScript, torch.compile, torch.export, half precision, autocast."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from tests.registered import SMALL
from tests.tolerances import relative_rms

SIZE = (2, 3, 48, 32)

small_model = pytest.mark.parametrize("name", SMALL)


def create(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def gradients(model: nn.Module, run, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@small_model
def test_torchscript_saves_loads_and_agrees(name: str) -> None:
    model, x = create(name, scriptable=True).eval(), torch.randn(SIZE)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
        other = torch.randn(1, 3, 33, 65)
        torch.testing.assert_close(loaded(other), model(other))


@small_model
def test_scripted_feature_pyramid_equals_eager(name: str) -> None:
    model, x = create(name, scriptable=True).eval(), torch.randn(SIZE)
    indices = tuple(range(len(model.feature_info)))[-3:]
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=list(indices), intermediates_only=True)
        getter = FeatureGetterNet(model, out_indices=indices).eval()
        torch.testing.assert_close(getter(x), expected)
        scripted, file = torch.jit.script(getter), io.BytesIO()
        torch.testing.assert_close(scripted(x), expected)
        torch.jit.save(scripted, file)  # whose text is read again by other rules
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), expected)


@small_model
def test_compiles_into_one_graph_with_the_same_gradients(name: str) -> None:
    model, x = create(name).train(), torch.randn(SIZE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(gradients(model, compiled, x), gradients(model, model, x))


@small_model
def test_exports_with_any_batch(name: str) -> None:
    model = create(name).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(SIZE),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, *SIZE[1:])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
    called = [str(node.target) for node in program.graph.nodes]
    assert any("vision_mamba.cross_selective_scan" in target or "vision_mamba.ssd" in target for target in called)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace holds for its own size, and says so
@small_model
def test_jit_trace_agrees(name: str) -> None:
    model, x = create(name).eval(), torch.randn(SIZE)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@small_model
def test_bfloat16_model_trains_a_step(name: str) -> None:
    model, x = create(name).to(torch.bfloat16), torch.randn(SIZE, dtype=torch.bfloat16)
    logits = model(x)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    logits.float().square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@small_model
def test_float64_model_agrees_with_float32(name: str) -> None:
    model, x = create(name).eval(), torch.randn(SIZE)
    with torch.no_grad():
        narrow = model(x)
        wide = model.double()(x.double())
    assert wide.dtype == torch.float64
    assert relative_rms(narrow, wide) < 1e-5


@small_model
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_is_finite_and_close(name: str, dtype: torch.dtype, bound: float) -> None:
    model, x = create(name).train(), torch.randn(SIZE)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        logits = model(x)
    assert logits.isfinite().all()
    assert relative_rms(logits, expected) < bound
    logits.float().square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.dtype == parameter.dtype, key
