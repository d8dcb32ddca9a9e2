"""The Mamba-2 mixer against its definition, the published code's numbers, and itself token by token."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from tests import golden
from tests.tolerances import relative_rms
from vision_mamba.layers import Mamba, Mamba2, MixerStack, SequenceClassifier
from vision_mamba.layers.mamba2 import GatedRMSNorm

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "mamba2.json").read_text())["mixers"]
F64 = torch.float64
FORMS = [
    dict(),
    dict(ngroups=2, norm_before_gate=True, D_has_hdim=True),
    dict(rmsnorm=False, bias=True, conv_bias=False, d_conv=2),
    dict(d_ssm=8, dt_limit=(0.01, 0.05), chunk_size=4),
]


def small(**arguments: object) -> Mamba2:
    """16 inner channels in 4 heads."""
    return Mamba2(8, **{"d_state": 3, "headdim": 4, "dtype": F64, **arguments})  # type: ignore[arg-type]


def by_definition(m: Mamba2, u: Tensor) -> Tensor:
    """The causal mixer in a loop over tokens, every product written out."""
    gate, value, z, xBC, dt = m.in_proj(u).split(m.widths, -1)
    batch, length, _ = u.shape
    padded = F.pad(xBC, (0, 0, m.d_conv - 1, 0))
    xBC = sum(padded[:, j : j + length] * m.conv1d.weight[:, 0, j] for j in range(m.d_conv))
    xBC = F.silu(xBC if m.conv1d.bias is None else xBC + m.conv1d.bias)
    x, B, C = xBC.split([m.d_ssm, m.ngroups * m.d_state, m.ngroups * m.d_state], -1)
    x = x.unflatten(-1, (m.nheads, m.headdim))
    B, C = (t.unflatten(-1, (m.ngroups, -1)).repeat_interleave(m.nheads // m.ngroups, 2) for t in (B, C))
    s = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit)
    D = m.D.unflatten(0, (m.nheads, -1))
    h, ys = x.new_zeros(batch, m.nheads, m.headdim, m.d_state), []
    for t in range(length):
        decay = torch.exp(-s[:, t] * m.A_log.exp())[..., None, None]
        h = decay * h + s[:, t, :, None, None] * x[:, t].unsqueeze(-1) * B[:, t].unsqueeze(-2)
        ys.append((h * C[:, t].unsqueeze(-2)).sum(-1) + D * x[:, t])
    y = torch.stack(ys, 1).flatten(2)
    if m.norm is None:
        y = y * F.silu(z)
    else:
        y = y if m.norm.norm_before_gate else y * F.silu(z)
        parts = y.unflatten(-1, (m.ngroups, -1))
        y = (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * m.norm.weight
        y = y * F.silu(z) if m.norm.norm_before_gate else y
    return m.out_proj(torch.cat((F.silu(gate) * value, y), -1))


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_definition(form: dict) -> None:
    mixer, u = small(**form), torch.randn(2, 9, 8, dtype=F64)
    assert torch.allclose(mixer(u), by_definition(mixer, u), atol=1e-12, rtol=0)


@pytest.mark.parametrize("direction", ["reversed", "both", "none"])
@torch.no_grad()
def test_directions(direction: str) -> None:
    """Read backwards, a sequence gives what the reversed one gives forwards; without an order, what it gives too."""
    mixer, u = small(direction=direction), torch.randn(2, 9, 8, dtype=F64)
    if direction == "reversed":
        causal = small()
        causal.load_state_dict(mixer.state_dict())
        assert torch.allclose(mixer(u), causal(u.flip(1)).flip(1), atol=1e-12, rtol=0)
        return
    odd = small(direction=direction, d_conv=3)
    mirrored = small(direction=direction, d_conv=3)
    mirrored.load_state_dict(odd.state_dict())
    mirrored.conv1d.weight.copy_(odd.conv1d.weight.flip(-1))
    assert torch.allclose(odd(u), mirrored(u.flip(1)).flip(1), atol=1e-12, rtol=0)
    changed = u.clone()
    changed[:, -1] += 1
    assert ((mixer(u) - mixer(changed))[:, 0].abs() > 1e-6).any()  # the first token sees the last


@pytest.fixture(params=PUBLISHED, ids=lambda mixer: mixer["name"])
def published(request: pytest.FixtureRequest) -> tuple[Mamba2, dict]:
    fixture = request.param
    mixer = Mamba2(**fixture["arguments"])
    state = golden.fill_state_dict(mixer.state_dict())
    assert {name: list(tensor.shape) for name, tensor in state.items()} == fixture["shapes"]
    # In the order of the published names, which the hash goes by.
    assert golden.fingerprint({name: state[name] for name in fixture["shapes"]}) == fixture["weights"]
    mixer.load_state_dict(state)
    return mixer, fixture


def test_published_output_and_gradients(published: tuple[Mamba2, dict]) -> None:
    mixer, fixture = published
    x = golden.image(*fixture["input"]).requires_grad_()
    y = mixer(x)
    assert torch.allclose(y[:, ::5].flatten(), torch.tensor(fixture["output"]), atol=1e-5, rtol=0)
    tensors = {"input": x, **dict(mixer.named_parameters())}
    loss = (y * golden.image(*y.shape)).sum()
    for name, found in zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True):
        norm, *first = fixture["gradients"][name]
        assert found.norm().item() == pytest.approx(norm, rel=1e-4), name
        assert torch.allclose(found.flatten()[:3], torch.tensor(first), atol=1e-4 * norm, rtol=0), name


@torch.no_grad()
def test_published_states(published: tuple[Mamba2, dict]) -> None:
    mixer, fixture = published
    x = golden.image(*fixture["input"])
    cache = mixer.allocate_inference_cache(len(x), x.shape[1])
    mixer(x, cache)
    for found, name in ((cache[0][0, :4], "conv_state"), (cache[1][:, :, ::8], "ssm_state")):
        assert torch.allclose(found.flatten(), torch.tensor(fixture[name]), atol=1e-5, rtol=0), name


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("split", [0, 1, 7])
@torch.no_grad()
def test_prefill_then_step_is_one_shot(form: dict, split: int) -> None:
    mixer, u = small(**form), torch.randn(2, 12, 8, dtype=F64)
    cache = mixer.allocate_inference_cache(2, max_seqlen=12)
    parts = [mixer(u[:, :split], cache)] if split else []
    for t in range(split, 12):
        y, conv, ssm = mixer.step(u[:, t : t + 1], *cache)
        assert conv is cache[0] and ssm is cache[1]
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), mixer(u), atol=1e-12, rtol=0)
    again = mixer.allocate_inference_cache(2)
    mixer(u, again)
    for found, expected in zip(cache, again, strict=True):
        assert torch.allclose(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("direction", ["causal", "both", "none"])
def test_gradients(direction: str) -> None:
    mixer = Mamba2(2, d_state=2, d_conv=2, headdim=2, direction=direction, dtype=F64)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def run(u: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (u,))

    u = torch.randn(1, 4, 2, dtype=F64, requires_grad=True)
    assert gradcheck(run, (u, *values), fast_mode=True)


def test_initialisation() -> None:
    """-A uniform in its range, steps log-uniform in theirs, skip of 1: in float32 whatever the type."""
    mixer = Mamba2(1024, d_state=4, headdim=4, conv_init=0.02, dtype=torch.bfloat16)
    wide = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_bias"}
    A = mixer.A_log.detach().exp()
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16.001 and abs(A.mean() - 8.5) < 1
    logs = F.softplus(mixer.dt_bias.detach().double()).log10()
    assert -3 - 1e-5 <= logs.min() < -2.9 and -1.1 < logs.max() <= -1 + 1e-5
    assert torch.equal(mixer.D, torch.ones(512))
    assert mixer.conv1d.weight.abs().max() <= 0.0201
    fresh = Mamba2(32, headdim=8, d_state=4, device="meta").to_empty(device="cpu")
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert fresh(torch.randn(1, 5, 32)).isfinite().all()


def test_the_norm_is_torchs_on_one_group() -> None:
    x, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    plain = F.rms_norm(x * F.silu(z), (8,), eps=1e-5)
    assert torch.allclose(GatedRMSNorm(8)(x, z), plain, atol=1e-6)
    assert torch.allclose(
        GatedRMSNorm(8, norm_before_gate=True)(x, z), F.rms_norm(x, (8,), eps=1e-5) * F.silu(z), atol=1e-6
    )


@pytest.mark.parametrize("direction", ["causal", "both", "none"])
def test_under_autocast(direction: str) -> None:
    mixer, u = Mamba2(32, d_state=8, headdim=8, direction=direction), torch.randn(2, 30, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(u)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and mixer.A_log.grad.dtype == torch.float32
    exact = mixer(u).detach()
    assert float((y.detach() - exact).norm() / exact.norm()) < 0.02
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("direction", ["both", "none"])
def test_trains_in_bfloat16(direction: str) -> None:
    """A few steps; tools/mamba2_digits.py does five hundred."""
    torch.manual_seed(0)
    stack = MixerStack(16, 1, lambda dim, **dd: Mamba2(dim, d_state=8, headdim=8, direction=direction, **dd))
    model = SequenceClassifier(torch.nn.Linear(2, 16), stack, num_classes=2, pool="avg")
    x = torch.randn(64, 12, 2)
    labels = (x[:, :, 0].mean(1) > 0).long()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_torchs_tools() -> None:
    """One graph without breaks; exported; without memory; an empty batch."""
    for direction in ("causal", "both"):
        mixer, u = Mamba2(16, d_state=4, headdim=8, direction=direction), torch.randn(2, 6, 16)
        expected = mixer(u)
        assert torch.allclose(torch.compile(mixer, backend="eager", fullgraph=True)(u), expected, atol=1e-6)
        assert torch.allclose(torch.export.export(mixer, (u,)).module()(u), expected, atol=1e-6)
        assert mixer.to("meta")(u.to("meta")).shape == u.shape
    assert Mamba2(16, headdim=8)(torch.zeros(0, 5, 16)).shape == (0, 5, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mamba2(32, headdim=48), "Mamba2: headdim must divide d_ssm, .* 64 inner channels, got headdim 48"),
        (lambda: Mamba2(32, d_ssm=128), "Mamba2: headdim must divide d_ssm, .* got headdim 64 and d_ssm 128"),
        (lambda: Mamba2(32, headdim=16, ngroups=3), "Mamba2: ngroups must divide the 4 heads, got 3"),
        (lambda: Mamba2(32, A_init_range=(0, 1)), "Mamba2: A_init_range must be .* got \\(0, 1\\)"),
        (lambda: Mamba2(32, headdim=0), "Mamba2: headdim must be a whole number from 1, got 0"),
        (lambda: Mamba2(32, dt_limit=(1, 0)), r"Mamba2: dt_limit must be .* got \(1, 0\)"),
        (lambda: small()(torch.zeros(2, 3, 7, dtype=F64)), r"Mamba2: x must be \(batch, tokens, 8\)"),
        (
            lambda: small()(torch.zeros(2, 3, 8, dtype=F64), small().allocate_inference_cache(2)[::-1]),
            "Mamba2: the cache must hold .*; make it by allocate_inference_cache",
        ),
        (lambda: Mamba2(32, dt_min=0.2), "Mamba2: steps must start from 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        (lambda: Mamba2(32, direction="up"), "Mamba2: direction must be one of causal, reversed, both, none, got 'up'"),
        (
            lambda: small(direction="both").step(torch.zeros(1, 1, 8, dtype=F64), *small().allocate_inference_cache(1)),
            "Mamba2: a cache continues a causal sequence, but direction is 'both'",
        ),
        (
            lambda: small().step(torch.zeros(2, 3, 8, dtype=F64), *small().allocate_inference_cache(2)),
            r"Mamba2.step: x must be one token \(batch, 1, 8\), got \(2, 3, 8\)",
        ),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Mamba(48, 8),
        lambda: Mamba(32, 4, d_conv=3, groups=2),
        lambda: Mamba2(48, d_state=16, headdim=32),
        lambda: Mamba2(48, d_state=16, headdim=16, ngroups=2, direction="both", norm_before_gate=True),
        lambda: Mamba2(32, d_state=8, headdim=16, d_conv=2, direction="reversed", rmsnorm=False),
    ],
)
def test_on_a_gpu(make, dtype: torch.dtype) -> None:
    """With kernels of its neighbours, as in plain torch in float64: output and every gradient."""
    mixer = make()
    exact, mixer = copy.deepcopy(mixer).double(), mixer.cuda()
    x = torch.randn(2, 70, mixer.d_model)
    dy = torch.randn_like(x)
    results = []
    for module, device in ((exact, "cpu"), (mixer, "cuda")):
        inputs = x.to(device, torch.float64 if device == "cpu" else torch.float32).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda" and dtype == torch.bfloat16):
            y = module(inputs)
        y.backward(dy.to(y))
        results.append([y, inputs.grad, *(p.grad for p in module.parameters())])
    for name, expected, found in zip(["y", "dx", *dict(mixer.named_parameters())], *results, strict=True):
        assert relative_rms(found, expected) < (1e-5 if dtype == torch.float32 else 2e-2), name


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [Mamba, Mamba2])
def test_token_by_token_on_a_gpu(mixer) -> None:
    made, x = mixer(64).cuda(), torch.randn(3, 20, 64, device="cuda")
    cache = made.allocate_inference_cache(3, 20)
    with torch.no_grad():
        parts = [made(x[:, :9], cache), *(made.step(x[:, t : t + 1], *cache)[0] for t in range(9, 20))]
        assert relative_rms(torch.cat(parts, 1), made(x)) < 1e-5
