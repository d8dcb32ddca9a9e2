"""Every family on a GPU: the logits and gradients of the CPU, half precision without NaN, CUDA graphs."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.registered import SMALL
from tests.tolerances import LOGITS
from vision_mamba.ops import compiled

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's convolutions keep ten bits of float32 on GPUs unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def step(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(images)
    loss = (logits.float() * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).sum()
    return logits, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", SMALL)
def test_equals_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    logits, grads = step(model, images)
    found, found_grads = step(model.cuda(), images.cuda())
    assert (found.cpu() - logits).abs().max() <= LOGITS * logits.abs().max()
    scale = max(grad.norm() for grad in grads)
    for (parameter, _), grad, other in zip(model.named_parameters(), grads, found_grads, strict=True):
        assert (other.cpu() - grad).norm() <= 1e-3 * max(grad.norm(), 1e-3 * scale), parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_close(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).cuda().eval()
    images = torch.randn(4, 3, *model.default_cfg["input_size"][1:], device="cuda")
    exact, _ = step(model, images)
    with torch.autocast("cuda", dtype):
        logits, grads = step(model, images)
    assert (logits - exact).norm() <= 0.05 * exact.norm()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", SMALL)
def test_is_captured_in_a_graph(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).cuda().eval()
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:], device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = model(images)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(images)
        logits.zero_()
        graph.replay()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", SMALL)
def test_checkpoints_change_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).cuda().train()
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:], device="cuda")
    logits, grads = step(model, images)
    model.set_grad_checkpointing()
    found, found_grads = step(model, images)
    assert (found - logits).norm() <= 1e-5 * logits.norm()
    scale = max(grad.norm() for grad in grads)
    for (parameter, _), grad, other in zip(model.named_parameters(), grads, found_grads, strict=True):
        assert (other - grad).norm() <= 1e-4 * max(grad.norm(), 1e-3 * scale), parameter


@pytest.mark.parametrize("name", SMALL)
def test_anomalies_are_not_found_in_half_precision(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).cuda().train()
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:], device="cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with torch.autograd.detect_anomaly(), torch.autocast("cuda", torch.float16):
        loss = model(images).float().square().mean()
        scaler.scale(loss).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0, "the step was not left out"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_trains_in_graphs_of_the_compiler(name: str) -> None:
    """mode="reduce-overhead" runs a step to warm up, captures the next and replays it from then on."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).cuda().eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        images = torch.randn(2, 3, *model.default_cfg["input_size"][1:], device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        logits, grads = step(compiled, images)  # type: ignore[arg-type]
        expected, expected_grads = step(model, images)
        assert (logits - expected).abs().max() <= LOGITS * expected.abs().max()
        found, exact = (torch.cat([grad.flatten() for grad in each]) for each in (grads, expected_grads))
        assert (found - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("name", SMALL)
def test_compiled_in_half_precision_for_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_is_captured", lambda: True)  # as for CUDA graphs
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).cuda().eval()
    run = torch.compile(model, fullgraph=True)
    for batch in (2, 3, 5):  # from the second on for any
        images = torch.randn(batch, 3, *model.default_cfg["input_size"][1:], device="cuda")
        exact, exact_grads = step(model, images)
        with torch.autocast("cuda", torch.bfloat16):
            logits, grads = step(run, images)  # type: ignore[arg-type]
            _, eager_grads = step(model, images)
        assert (logits - exact).norm() <= 0.05 * exact.norm()
        apart, eager, length = (
            torch.cat([(a - b).flatten() for a, b in zip(found, others, strict=True)]).norm()
            for found, others in ((grads, exact_grads), (eager_grads, exact_grads), (exact_grads, [0] * len(grads)))
        )
        assert apart <= 1.5 * eager + 0.01 * length
        assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert (run(images) - exact).norm() <= 0.05 * exact.norm()
