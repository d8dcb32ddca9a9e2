"""Stacks of mixers in both orders, their caches, and the classifier on words, features and patches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn

from tests.tolerances import relative_rms
from vision_mamba.layers import Mamba, MixerStack, SequenceClassifier
from vision_mamba.ssm import S4D

pytestmark = pytest.mark.usefixtures("one_thread")

MIXERS = {"mamba": partial(Mamba, d_state=4), "s4d": partial(S4D, d_state=8)}


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest):
    return MIXERS[request.param]


def both_orders(mixer, **arguments: object) -> tuple[MixerStack, MixerStack]:
    plain, fused = (MixerStack(16, 3, mixer, fused_add_norm=order, **arguments) for order in (False, True))
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("wide", [False, True])
def test_both_orders_are_one_function(mixer, wide: bool) -> None:
    plain, fused = both_orders(mixer, residual_in_fp32=wide)
    x = torch.randn(2, 9, 16)
    y = plain(x)
    assert torch.equal(fused(x), y)
    expected = x
    for layer in plain.layers:
        expected = expected + layer.mixer(layer.norm(expected))
    assert torch.allclose(y, plain.norm_f(expected), atol=1e-6)
    grads = [torch.autograd.grad(stack(x).square().sum(), list(stack.parameters())) for stack in (plain, fused)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_a_wide_stream_keeps_what_half_precision_drops() -> None:
    for fused in (False, True):
        errors = {}
        for wide in (False, True):
            torch.manual_seed(0)
            stack = MixerStack(16, 6, fused_add_norm=fused, residual_in_fp32=wide, dtype=torch.bfloat16)
            exact = MixerStack(16, 6, fused_add_norm=fused, dtype=torch.float64)
            exact.load_state_dict(stack.state_dict())
            x = 100 * torch.randn(2, 20, 16, dtype=torch.bfloat16)
            y, expected = stack(x), exact(x.double())
            assert y.dtype == torch.bfloat16
            errors[wide] = float((y.double() - expected).norm() / expected.norm())
        assert errors[True] < 0.02 and errors[True] <= errors[False], errors


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_prefill_then_step_is_one_shot(mixer, fused: bool) -> None:
    stack = MixerStack(16, 3, mixer, fused_add_norm=fused, dtype=torch.float64)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    caches = stack.allocate_inference_cache(2, max_seqlen=12)
    parts = [stack(part, caches) for part in x.split([7, 1, 1, 1, 1, 1], 1)]
    assert torch.allclose(torch.cat(parts, 1), stack(x), atol=1e-10, rtol=0)


def test_a_cache_holds_no_graph(mixer) -> None:
    """A sequence in parts can be trained on, each part by itself."""
    layer = mixer(16)
    cache = layer.allocate_inference_cache(1)
    losses = [layer(torch.randn(1, length, 16), cache).sum() for length in (5, 1, 5)]
    losses.append(layer.step(torch.randn(1, 1, 16), *cache)[0].sum())
    sum(losses).backward()
    assert not any(state.requires_grad for state in cache)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_names_are_the_published() -> None:
    names = {name for name, _ in MixerStack(16, 2).named_parameters()}
    mixer = {"A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
             "dt_proj.bias", "out_proj.weight"}  # fmt: skip
    expected = {f"layers.{i}.mixer.{name}" for i in range(2) for name in mixer}
    assert names == expected | {"layers.0.norm.weight", "layers.1.norm.weight", "norm_f.weight"}


def test_output_projections_start_smaller_in_deeper_stacks() -> None:
    def spread(**arguments: object) -> float:
        return MixerStack(64, 9, **arguments).layers[4].mixer.out_proj.weight.abs().max().item()

    bound = 128**-0.5
    assert 0.95 * bound < spread(rescale=False) <= bound
    assert 0.95 * bound / 3 < spread() <= bound / 3


def test_drop_path() -> None:
    """Dropped, every block but the first leaves its input as it is; in evaluation none does."""
    stack = MixerStack(16, 3, drop_path_rate=1 - 1e-7)
    kept = MixerStack(16, 3)
    kept.load_state_dict(stack.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(stack.eval()(x), kept(x))
    first = x + stack.layers[0](x)
    with torch.no_grad():
        last_dropped = torch.stack([stack.train().layers[2](first) for _ in range(3)])
    assert torch.equal(last_dropped, torch.zeros_like(last_dropped))


EMBEDDINGS = {
    "words": (lambda: nn.Embedding(10, 16), lambda: torch.randint(10, (3, 9))),
    "features": (lambda: nn.Linear(5, 16), lambda: torch.randn(3, 9, 5)),
    "patches": (lambda: PatchEmbed((8, 12), 4, 3, 16), lambda: torch.randn(3, 3, 8, 12)),
}


@pytest.mark.parametrize("pool", ["last", "avg"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_classifier(kind: str, pool: str) -> None:
    embed, sample = EMBEDDINGS[kind]
    model = SequenceClassifier(embed(), MixerStack(16, 2), 7, pool)
    x = sample()
    tokens = model.stack(model.embed(x))
    logits = model(x)
    assert logits.shape == (3, 7)
    assert torch.equal(logits, model.head(tokens[:, -1] if pool == "last" else tokens.mean(1)))
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pool", ["last", "avg"])
@torch.no_grad()
def test_padding_is_not_read(mixer, pool: str) -> None:
    model = SequenceClassifier(nn.Linear(5, 16), MixerStack(16, 2, mixer), 7, pool)
    lengths = torch.tensor([4, 9, 1])
    x = torch.randn(3, 9, 5)
    found = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(found[row], model(x[row : row + 1, :length])[0], atol=1e-5)


def test_no_weight_decay_names_the_state_spaces(mixer) -> None:
    model = SequenceClassifier(nn.Linear(5, 16), MixerStack(16, 2, mixer), 7)
    names = {name.removeprefix("stack.layers.0.mixer.") for name in model.no_weight_decay() if ".0." in name}
    assert names == ({"A_log", "D", "dt_proj.bias"} if isinstance(model.stack.layers[0].mixer, Mamba) else
                     {"A_real_log", "A_imag", "log_dt", "C", "D"})  # fmt: skip
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_it_learns_what_needs_selection() -> None:
    """Say which word follows the mark, wherever in a sequence of others that is."""
    torch.manual_seed(0)
    words, length = 4, 12
    stack = MixerStack(16, 2, partial(Mamba, d_state=4))
    model = SequenceClassifier(nn.Embedding(words + 1, 16), stack, words)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randint(words, (size, length))
        place = torch.randint(length - 1, (size, 1))
        x.scatter_(1, place, words)
        return x, x.gather(1, place + 1).squeeze(1)

    for _ in range(100):
        x, answer = batch(32)
        loss = F.cross_entropy(model(x), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, answer = batch(256)
    with torch.no_grad():
        right = float((model(x).argmax(1) == answer).float().mean())
    assert right > 0.9, right


def classify(lengths: torch.Tensor) -> torch.Tensor:
    model = SequenceClassifier(nn.Linear(5, 16), MixerStack(16, 1), 7)
    return model(torch.zeros(2, 3, 5), lengths)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SequenceClassifier(nn.Linear(5, 16), MixerStack(16, 1), 7, "max"),
            "SequenceClassifier: pool must be one of last, avg, got 'max'",
        ),
        (
            lambda: SequenceClassifier(nn.Linear(5, 8), MixerStack(16, 1), 7)(torch.zeros(2, 9, 5)),
            r"SequenceClassifier: embed must give tokens \(batch, length, 16\), .* got \(2, 9, 8\)",
        ),
        (
            lambda: MixerStack(16, 2)(torch.zeros(1, 3, 16), MixerStack(16, 1).allocate_inference_cache(1)),
            "MixerStack: caches must be one for each of the 2 blocks, got 1",
        ),
        (lambda: classify(torch.tensor([0, 2])), r"lengths must be from 1 to the 3 tokens, got \[0, 2\]"),
        (lambda: classify(torch.tensor([1, 4])), r"lengths must be from 1 to the 3 tokens, got \[1, 4\]"),
        (lambda: classify(torch.tensor([1, 2, 3])), r"lengths must be \(batch,\) = \(2,\), got \(3,\)"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_on_a_gpu(fused: bool) -> None:
    """Either order gives what plain torch gives, with gradients, under autocast too."""
    stack = MixerStack(64, 3, fused_add_norm=fused)
    x = torch.randn(2, 50, 64)
    exact, found = stack(x), stack.cuda()(x.cuda())
    assert relative_rms(found, exact) < 1e-5
    with torch.autocast("cuda", torch.bfloat16):
        y = stack(x.cuda())
    assert relative_rms(y, exact) < 2e-2
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stack.parameters())
