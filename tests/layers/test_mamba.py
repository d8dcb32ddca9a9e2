"""The Mamba mixer against its definition, the published code's numbers, and itself token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from tests import golden
from vision_mamba.layers import Mamba

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "mamba.json").read_text())
F64 = torch.float64
#: Every form of B and C: of each token, in groups, constant.
FORMS = [
    dict(),
    dict(groups=4),
    dict(selective_B=False),
    dict(selective_C=False),
    dict(selective_B=False, selective_C=False),
    dict(groups=4, selective_B=False),
    dict(groups=4, selective_C=False),
]


def small(**arguments: object) -> Mamba:
    return Mamba(8, **{"d_state": 3, "dtype": F64, **arguments})  # type: ignore[arg-type]


def by_definition(mixer: Mamba, u: Tensor) -> Tensor:
    """The mixer in a loop over tokens, every product written out."""
    x, z = mixer.in_proj(u).chunk(2, -1)
    batch, length, channels = x.shape
    taps = mixer.conv1d.weight[:, 0]
    padded = F.pad(x, (0, 0, taps.shape[1] - 1, 0))
    x = sum(padded[:, j : j + length] * taps[:, j] for j in range(taps.shape[1]))
    x = F.silu(x if mixer.conv1d.bias is None else x + mixer.conv1d.bias)
    columns = mixer.x_proj(x)
    dt = F.softplus(mixer.dt_proj(columns[..., : mixer.dt_rank]))
    rest = columns[..., mixer.dt_rank :].unflatten(-1, (-1, mixer.groups, mixer.d_state)).unbind(2)
    selective = iter(rest)
    shape = (batch, length, channels, mixer.d_state)
    B, C = (
        next(selective).repeat_interleave(channels // mixer.groups, 2) if constant is None else constant.expand(shape)
        for constant in (mixer.B, mixer.C)
    )
    h, ys = x.new_zeros(batch, channels, mixer.d_state), []
    for t in range(length):
        s = dt[:, t].unsqueeze(-1)
        h = torch.exp(-s * mixer.A_log.exp()) * h + s * B[:, t] * x[:, t].unsqueeze(-1)
        ys.append((C[:, t] * h).sum(-1) + mixer.D * x[:, t])
    return mixer.out_proj(torch.stack(ys, 1) * F.silu(z))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("more", [dict(), dict(conv_bias=False, bias=True, d_conv=1, expand=1, dt_rank=2)], ids=str)
@torch.no_grad()
def test_definition(form: dict, more: dict) -> None:
    mixer = small(**form, **more)
    u = torch.randn(2, 9, 8, dtype=F64)
    assert torch.allclose(mixer(u), by_definition(mixer, u), atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def published() -> Mamba:
    mixer = Mamba(**FIXTURE["arguments"])
    state = golden.fill_state_dict(mixer.state_dict())
    assert golden.fingerprint(state) == FIXTURE["weights"]
    mixer.load_state_dict(state)
    return mixer


def test_names_and_shapes_are_the_published() -> None:
    state = Mamba(**FIXTURE["arguments"]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == FIXTURE["shapes"]
    assert list(state) and all(tensor.dtype == torch.float32 for tensor in state.values())


def test_published_output_and_gradients(published: Mamba) -> None:
    x = golden.image(*FIXTURE["input"]).requires_grad_()
    y = published(x)
    assert torch.allclose(y[:, ::5].flatten(), torch.tensor(FIXTURE["output"]), atol=1e-5, rtol=0)
    tensors = {"input": x, **dict(published.named_parameters())}
    loss = (y * golden.image(*y.shape)).sum()
    for name, found in zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True):
        norm, *first = FIXTURE["gradients"][name]
        assert found.norm().item() == pytest.approx(norm, rel=1e-4), name
        assert torch.allclose(found.flatten()[:3], torch.tensor(first), atol=1e-4 * norm, rtol=0), name


@torch.no_grad()
def test_published_states(published: Mamba) -> None:
    x = golden.image(*FIXTURE["input"])
    conv_state, ssm_state = published.allocate_inference_cache(len(x), x.shape[1])
    for t in range(x.shape[1]):
        y, conv, ssm = published.step(x[:, t : t + 1], conv_state, ssm_state)
        assert conv is conv_state and ssm is ssm_state
    assert torch.allclose(y[:, 0], published(x)[:, -1], atol=1e-5)
    for found, name in ((conv_state[0, :4], "conv_state"), (ssm_state[:, ::8], "ssm_state")):
        assert torch.allclose(found.flatten(), torch.tensor(FIXTURE[name]), atol=1e-5, rtol=0), name


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("split", [0, 1, 2, 7, 11])
@torch.no_grad()
def test_prefill_then_step_is_one_shot(form: dict, d_conv: int, split: int) -> None:
    mixer = small(d_conv=d_conv, **form)
    u = torch.randn(2, 12, 8, dtype=F64)
    cache = mixer.allocate_inference_cache(2, max_seqlen=12)
    parts = [mixer(u[:, :split], cache)] if split else []
    parts += [mixer.step(u[:, t : t + 1], *cache)[0] for t in range(split, 12)]
    assert torch.allclose(torch.cat(parts, 1), mixer(u), atol=1e-12, rtol=0)
    again = mixer.allocate_inference_cache(2, max_seqlen=12)
    mixer(u, again)
    for found, expected in zip(cache, again, strict=True):
        assert torch.allclose(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_parts_of_any_length() -> None:
    mixer, u = small(), torch.randn(2, 20, 8, dtype=F64)
    cache = mixer.allocate_inference_cache(2)
    parts = [mixer(part, cache) for part in u.split([3, 1, 9, 2, 5], 1)]
    assert torch.allclose(torch.cat(parts, 1), mixer(u), atol=1e-12, rtol=0)


@torch.no_grad()
def test_no_token_sees_what_comes() -> None:
    mixer, u = small(), torch.randn(1, 10, 8, dtype=F64)
    changed = u.clone()
    changed[:, 6:] = torch.randn(1, 4, 8, dtype=F64)
    assert torch.equal(mixer(u)[:, :6], mixer(changed)[:, :6])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[4]], ids=str)
def test_gradients(form: dict) -> None:
    mixer = Mamba(2, d_state=2, d_conv=2, dt_rank=1, dtype=F64, **form)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def run(u: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (u,))

    u = torch.randn(1, 4, 2, dtype=F64, requires_grad=True)
    assert gradcheck(run, (u, *values), fast_mode=True)


def test_initialisation() -> None:
    """S4D-real A, skip of 1, steps log-uniform in the range: published, and in float32 whatever the type."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = Mamba(256, d_state=4, dtype=dtype)
        assert torch.equal(mixer.A_log, torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(512, 4))
        assert torch.equal(mixer.D, torch.ones(512))
        assert mixer.dt_proj.bias.dtype == torch.float32 and mixer.dt_proj.weight.dtype == dtype
        logs = F.softplus(mixer.dt_proj.bias.detach().double()).log10()
        assert -3 - 1e-5 <= logs.min() < -2.9 and -1.1 < logs.max() <= -1 + 1e-5
        assert abs(logs.mean().item() + 2) < 0.1
        bound = mixer.dt_rank**-0.5
        assert mixer.dt_rank == 16 and bound * 0.95 < mixer.dt_proj.weight.abs().max() <= bound


def test_starts_of_the_steps() -> None:
    mixer = Mamba(32, dt_init="constant", dt_scale=0.5)
    assert torch.equal(mixer.dt_proj.weight, torch.full_like(mixer.dt_proj.weight, 0.5 * mixer.dt_rank**-0.5))
    floored = Mamba(32, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-2)
    assert torch.allclose(F.softplus(floored.dt_proj.bias), torch.tensor(1e-2), rtol=1e-4)


def test_reset_parameters_starts_anew() -> None:
    """Every module by itself, as `to_empty` needs it, in whatever order they are visited."""
    mixer = Mamba(32, selective_B=False, selective_C=False, device="meta").to_empty(device="cpu")
    for module in mixer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert F.softplus(mixer.dt_proj.bias).min() >= 1e-3 * 0.99 and F.softplus(mixer.dt_proj.bias).max() <= 0.101
    assert torch.equal(mixer.A_log[0], torch.arange(1.0, 17).log())
    assert torch.equal(mixer.B, torch.ones(64, 16)) and abs(mixer.C.std().item() - 1) < 0.1
    assert mixer(torch.randn(1, 5, 32)).isfinite().all()


def test_what_is_constant_is_a_parameter() -> None:
    """x_proj makes no columns for it."""
    whole, no_b, neither = Mamba(32), Mamba(32, selective_B=False), Mamba(32, selective_B=False, selective_C=False)
    assert [m.x_proj.out_features for m in (whole, no_b, neither)] == [2 + 32, 2 + 16, 2]
    assert whole.B is None and whole.C is None and no_b.B.shape == neither.C.shape == (64, 16)
    assert Mamba(32, groups=4).x_proj.out_features == 2 + 2 * 4 * 16


def test_with_constant_weights_and_steps_it_is_time_invariant() -> None:
    """Without selection, a delayed input gives the delayed output: what S4 is and S6 is not."""
    torch.manual_seed(0)
    u = torch.randn(1, 10, 8, dtype=F64)
    late = F.pad(u, (0, 0, 5, 0))
    plain = small(selective_B=False, selective_C=False, conv_bias=False)
    with torch.no_grad():
        plain.x_proj.weight.zero_()
        assert torch.allclose(plain(late)[:, 5:], plain(u), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    mixer = Mamba(32, dtype=dtype)
    wide = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_proj.bias"}
    u = torch.randn(2, 30, 32).to(dtype)
    exact = Mamba(32, dtype=F64)
    exact.load_state_dict(mixer.state_dict())
    expected = exact(u.double())
    cache = mixer.allocate_inference_cache(2, 30)
    assert cache[0].dtype == dtype and cache[1].dtype == torch.float32
    steps = torch.cat([mixer.step(u[:, t : t + 1], *cache)[0] for t in range(30)], 1)
    for y in (mixer(u), steps):
        assert y.dtype == dtype
        assert float((y.double() - expected).norm() / expected.norm()) < 0.02


def test_under_autocast() -> None:
    mixer, u = Mamba(32), torch.randn(2, 30, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(u)
        cache = mixer.allocate_inference_cache(2, dtype=torch.bfloat16)
        prompt = mixer(u[:, :20], cache)
    y.float().sum().backward()
    assert y.dtype == prompt.dtype == torch.bfloat16 and mixer.A_log.grad.dtype == torch.float32
    exact = mixer(u).detach()
    assert float((y.detach() - exact).norm() / exact.norm()) < 0.02
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@torch.no_grad()
def test_torchs_tools() -> None:
    """One graph without breaks, of whole sequences and of single steps; exported; without memory."""
    mixer, u = Mamba(16), torch.randn(2, 6, 16)
    expected = mixer(u)
    assert torch.allclose(torch.compile(mixer, backend="eager", fullgraph=True)(u), expected, atol=1e-6)
    step, cache = torch.compile(mixer.step, backend="eager", fullgraph=True), mixer.allocate_inference_cache(2)
    steps = torch.cat([step(u[:, t : t + 1], *cache)[0] for t in range(6)], 1)
    assert torch.allclose(steps, expected, atol=1e-6)
    assert torch.allclose(torch.export.export(mixer, (u,)).module()(u), expected, atol=1e-6)
    assert Mamba(16, device="meta")(u.to("meta")).shape == u.shape


def test_an_empty_batch() -> None:
    assert Mamba(16)(torch.zeros(0, 5, 16)).shape == (0, 5, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mamba(32, dt_init="uniform"), "Mamba: dt_init must be one of random, constant, got 'uniform'"),
        (lambda: Mamba(32, dt_min=0.2), "Mamba: steps must start from 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        (lambda: Mamba(32, groups=3), "Mamba: groups must divide the 64 inner channels, got 3; choose a divisor"),
        (lambda: Mamba(32, groups=0), "Mamba: groups must be a whole number from 1, got 0"),
        (lambda: Mamba(32, expand=0.01), "Mamba: groups must divide the 0 inner channels"),
        (lambda: Mamba(32, dt_rank="auto"), "Mamba: dt_rank must be a whole number from 1, got 'auto'"),  # type: ignore
        (lambda: Mamba(32, d_conv=0), "Mamba: d_conv must be a whole number from 1, got 0"),
        (lambda: Mamba(32)(torch.zeros(5, 32)), r"Mamba: x must be \(batch, tokens, 32\) .*, got \(5, 32\)"),
        (lambda: Mamba(32)(torch.zeros(2, 0, 32)), r"with a token at least, got \(2, 0, 32\)"),
        (
            lambda: Mamba(32, d_state=4)(torch.zeros(2, 3, 32), Mamba(32, d_state=4).allocate_inference_cache(1)),
            r"states of \[64, 4\], \[64, 4\] for a batch of 2, got \(1, 64, 4\), \(1, 64, 4\); make it by allocate",
        ),
        (
            lambda: Mamba(32).step(torch.zeros(2, 3, 32), *Mamba(32).allocate_inference_cache(2)),
            r"Mamba.step: x must be one token \(batch, 1, 32\), got \(2, 3, 32\); give more of them to forward",
        ),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_default_rank() -> None:
    assert Mamba(40).dt_rank == math.ceil(40 / 16) and Mamba(40, dt_rank=7).dt_rank == 7
