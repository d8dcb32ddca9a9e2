"""Chains of layers by kernels: what they do with their kernels, held against the layers one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tolerances import relative_rms
from vision_mamba import ops
from vision_mamba.layers import SS2D, SSD2D, BiMamba, bimamba, joined, local, noncausal, ss2d
from vision_mamba.layers.local import LocalMamba
from vision_mamba.layers.noncausal import MapAttention, NonCausalSSD
from vision_mamba.layers.norm import LayerNorm, RMSNorm
from vision_mamba.models import vim, vmamba, vssd
from vision_mamba.ops import compiled, conv, fused, mixers, norm
from vision_mamba.ops.backends import gpu, mixers_cuda, routes_cuda, rows_cuda, sums_cuda
from vision_mamba.ops.backends.sums_cuda import Parts
from vision_mamba.ops.fused import Kernels
from vision_mamba.ops.known import Guards


def norms(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return partial(kind, eps=1e-5)


MIXERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ss2d": (lambda: SS2D(32, dt_rank=2), (2, 5, 7, 32)),
    "ss2d_of_three_states": (lambda: SS2D(16, d_state=3, ssm_ratio=2.0, conv_bias=True), (1, 4, 4, 16)),
    "ss2d_gated": (lambda: SS2D(16, d_state=2, ssm_ratio=2.0, gate=True), (2, 3, 4, 16)),
    "ss2d_of_weighed_routes": (
        lambda: SS2D(16, ssm_ratio=2.0, gate=True, route_attention=True, scan_order="local_2"),
        (2, 4, 6, 16),
    ),
    "ss2d_of_weighed_routes_alone": (lambda: SS2D(8, route_attention=True), (1, 3, 5, 8)),
    "localmamba": (lambda: OnGrid(LocalMamba(24, "local_2", d_state=3), 4, 6), (2, 24, 24)),
    "localmamba_mean": (
        lambda: OnGrid(LocalMamba(16, "bidirectional", d_conv=3, average=True, class_token="middle"), 3, 5),
        (1, 16, 16),
    ),
    "bimamba": (lambda: BiMamba(32, d_state=4), (2, 11, 32)),
    "bimamba_sum": (lambda: BiMamba(16, d_conv=3, average=False), (1, 3, 16)),
    "bimamba_of_words": (lambda: BiMamba(16, d_state=8, dt_rank=8), (2, 5, 16)),
    "vmamba_blocks": (lambda: Blocks(vmamba.VMambaBlock(16, SS2D, LayerNorm, nn.GELU), 2), (2, 3, 4, 16)),
    "vmamba_blocks_alone": (
        lambda: Blocks(vmamba.VMambaBlock(16, SS2D, norms(RMSNorm), nn.GELU, 0.0), 2),
        (1, 3, 4, 16),
    ),
    "m2_blocks": (
        lambda: Blocks(vmamba.VMambaBlock(16, partial(SSD2D, d_state=4, dt_rank=2), LayerNorm, nn.GELU), 2),
        (2, 3, 4, 16),
    ),
    "vssd_blocks": (
        lambda: Blocks(vssd.VSSDBlock(16, partial(NonCausalSSD, num_heads=2, d_state=4)), 2),
        (2, 3, 4, 16),
    ),
    "vssd_blocks_of_attention": (
        lambda: Blocks(vssd.VSSDBlock(16, partial(MapAttention, num_heads=2)), 2),
        (2, 3, 4, 16),
    ),
    "vim_blocks": (lambda: Blocks(vim.Block(16, norms(RMSNorm), BiMamba), 2, 1, 7), (2, 7, 16)),
}
CHAINS = dict(vmamba_blocks=["norm_linear", "scan_map", "norm_mlp"], vim_blocks=["norm_both_ways"])
CHAINS |= dict(vmamba_blocks_alone=["norm_linear", "scan_map"], m2_blocks=["norm_linear", "norm_mlp"])
CHAINS |= dict(vssd_blocks=["norm_linear", "norm_mlp"], vssd_blocks_of_attention=["norm_mlp"])


#: Those that go another way where there is much of them: step sizes are multiplied out.
LARGE = ("localmamba", "bimamba", "bimamba_sum", "bimamba_of_words", "vim_blocks")


class OnGrid(nn.Module):
    """A mixer of tokens that form a grid."""

    def __init__(self, mixer: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.mixer, self.height, self.width = mixer, height, width

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, self.height, self.width)


class Blocks(nn.Module):
    """So many of a block after another, and what they are given beside the stream."""

    def __init__(self, block: nn.Module, count: int, *given: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(count))
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return joined.run(self.blocks, x, *self.given)


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MIXERS[name]
    mixer = build()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixer, torch.randn(shape)


def run(mixer: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = mixer(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum()
    return [y, *torch.autograd.grad(loss, [x, *mixer.parameters()])]


def plain_conv_routes(x: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> Tensor:
    routes = []
    for steps, taps, offset in zip(table.long(), weight, bias, strict=True):
        u = F.pad(x[:, steps], (0, 0, taps.shape[1] - 1, 0)).transpose(1, 2)
        u = F.silu(F.conv1d(u, taps.unsqueeze(1), offset, groups=len(taps))).transpose(1, 2)
        routes.append(torch.zeros_like(u).index_copy(1, steps, u))
    return torch.stack(routes, 2)


def plain_attention(y: Tensor, z: Tensor | None, *parameters: Tensor, eps: float) -> Tensor:
    weight, bias, reduce_weight, reduce_bias, select_weight, select_bias = parameters
    v = y if z is None else y * F.silu(z).unsqueeze(2)
    hidden = F.linear(F.layer_norm(v, weight.shape, weight, bias, eps).mean(1), reduce_weight, reduce_bias)
    return (v * F.linear(F.gelu(hidden), select_weight, select_bias).sigmoid().unsqueeze(1)).sum(2)


def _stand_in(plain: Callable[..., Any], refuses: Callable[..., bool]) -> Kernels:
    """Kernels that are plain torch, so that what is made of them runs anywhere."""

    def results(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        found = plain(*tensors, **options)
        return found if isinstance(found, tuple) else (found,)

    def forward(tensors: fused.Tensors, options: dict[str, Any], keep: bool) -> Any:
        with torch.no_grad():
            return results(*tensors, **options), tensors

    def backward(kept: fused.Tensors, options: dict[str, Any], grads: fused.Tensors) -> fused.Tensors:
        with torch.enable_grad():
            tensors = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in kept]
            wanted = [t for t in tensors if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(results(*tensors, **options), wanted, grads))
        return tuple(None if t is None or not t.requires_grad else next(found) for t in tensors)

    return Kernels(refuses, forward, backward)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Joined layers on the CPU; the list fills with the names of the chains that ran."""
    plain = dict(CONV_MAP=conv.plain_conv_map, GATED=conv.plain_gated, NORM=norm.plain_normed)
    plain |= dict(CONV_BOTH_WAYS=conv.plain_conv_both_ways)
    # They refuse what the kernels refuse, on any device.
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    kernels = {name: _stand_in(function, getattr(rows_cuda, name).refuses) for name, function in plain.items()}
    for name, kernel in kernels.items():
        monkeypatch.setattr(rows_cuda, name, kernel)
    plain = dict(CONV_ROUTES=plain_conv_routes, ROUTE_ATTENTION=plain_attention)
    kernels |= {name: _stand_in(function, getattr(routes_cuda, name).refuses) for name, function in plain.items()}

    def attention_forward(tensors: fused.Tensors, options: dict[str, Any], keep: bool) -> Any:
        results, (y, z, *parameters) = kernels["ROUTE_ATTENTION"].forward(tensors, options, keep)
        return results, (y, z, y.float().sum(1), *parameters)

    def attention_backward(kept: Any, options: Any, grads: Any, dz: Tensor | None = None) -> Any:
        y, z, _, *parameters = kept
        dy, found, *others = kernels["ROUTE_ATTENTION"].backward((y, z, *parameters), options, grads)
        if dz is not None:
            dz.copy_(found)
        return dy, dz, *others

    def route_conv_backward(kept: Any, options: Any, grads: Any, dx: Tensor) -> Any:
        found = kernels["CONV_ROUTES"].backward(kept, options, grads)
        dx.copy_(found[0])
        return found

    monkeypatch.setattr(routes_cuda, "CONV_ROUTES", kernels["CONV_ROUTES"])
    monkeypatch.setattr(routes_cuda, "ROUTE_ATTENTION", kernels["ROUTE_ATTENTION"]._replace(forward=attention_forward))
    monkeypatch.setattr(routes_cuda, "attention_backward", attention_backward)
    monkeypatch.setattr(routes_cuda, "conv_backward", route_conv_backward)

    def norm_forward(tensors: fused.Tensors, options: dict[str, Any], keep: bool) -> Any:
        x, branch, weight, bias = tensors
        found = norm.plain_normed(*tensors, **options)
        found = found if options["stream"] else (found,)
        total, marker = (x, None) if branch is None else (found[1], branch.new_empty(0))
        return found, (total, weight, bias, marker)

    def in_parts(gradients: Any) -> list[Parts | None]:
        return [None if grad is None else Parts(torch.stack([grad / 4, grad * 3 / 4])) for grad in gradients]

    def norm_parts(kept: Any, options: Any, grads: Any, again: Tensor | None = None) -> Any:
        x, weight, bias, branch = kept
        kernel, options = kernels["NORM"], options | dict(stream=False)
        if again is not None:
            again.copy_(kernel.forward((x, None, weight, bias), options, False)[0][0].view_as(again))
        dx, _, dweight, dbias = kernel.backward((x, None, weight, bias), options, grads[:1])
        dx = dx if len(grads) == 1 or grads[1] is None else dx + grads[1]
        return dx, None if branch is None else dx.to(branch.dtype), in_parts((dweight, dbias))

    def norm_backward(kept: Any, options: Any, grads: Any) -> Any:
        dx, dbranch, parts = norm_parts(kept, options, grads)
        return dx, dbranch, *sums_cuda.finished(parts, kept[1:3])

    of_norms = kernels["NORM"]._replace(forward=norm_forward, backward=norm_backward)
    monkeypatch.setattr(rows_cuda, "NORM", of_norms)

    def map_parts(kept: Any, options: Any, grads: Any, dx: Tensor) -> Any:
        found, *others = kernels["CONV_MAP"].backward(kept, options, grads)
        return dx.copy_(found), in_parts(others)

    def gate_backward(y: Tensor, z: Tensor, dout: Tensor, dz: Tensor, again: Tensor, scale: float = 1.0) -> Tensor:
        dy, found = kernels["GATED"].backward((y, z), {}, (dout,))
        dz.copy_(found)
        again.copy_(scale * conv.plain_gated(y, z))
        return dy

    def gated_sum(shares: Tensor, z: Tensor, keep: bool, scale: float) -> tuple[Tensor, Tensor]:
        return scale * conv.plain_gated(shares.sum(2), z), shares.sum(2)

    def conv_parts(kept: Any, options: Any, grads: Any, dx: Tensor) -> Any:
        found, *others = kernels["CONV_BOTH_WAYS"].backward(kept, options, grads)
        return dx.copy_(found), in_parts(others)

    def row_parts(x: Tensor) -> Parts:
        return Parts(x)

    def gelu_backward(h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Parts]:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            a = F.gelu(h)
            (dh,) = torch.autograd.grad(a, h, dy)
        return a.detach(), dh, Parts(dh)

    stand_ins = (norm_parts, map_parts, gate_backward, gated_sum, conv_parts, row_parts, gelu_backward)
    monkeypatch.setattr(rows_cuda, "gelu_forward", F.gelu)
    for function in stand_ins:
        monkeypatch.setattr(rows_cuda, function.__name__, function)
    monkeypatch.setattr(sums_cuda, "sum_parts", lambda parts: [part.sum(0) for part in parts])
    for function, kernel in ((norm._fused, of_norms), (conv._fused_map, kernels["CONV_MAP"])):
        monkeypatch.setattr(function.joined, "_kernels", kernel)
    for layers in (ss2d, bimamba, local, noncausal, vim, vmamba, vssd):
        monkeypatch.setattr(layers, "eager_on_gpu", lambda x: True, raising=False)
        monkeypatch.setattr(layers, "chains_on_gpu", lambda x: True, raising=False)
    monkeypatch.setattr(fused, "_by_kernels", lambda tensors: True)
    monkeypatch.setattr(compiled, "goes_into_graphs", lambda x: True)
    ran: list[str] = []

    def forward(name: str, *given: Any) -> Any:
        ran.append(name)
        return kernels[name].forward(*given)

    for chain in vars(mixers).values():
        if not isinstance(chain, fused.Joined):
            continue
        kernels[chain.name] = chain._make_kernels()
        monkeypatch.setattr(chain, "_kernels", kernels[chain.name]._replace(forward=partial(forward, chain.name)))
        monkeypatch.setattr(chain, "_accepted", Guards())
        if chain.operator is not None:
            kernel = chain._kernels
            monkeypatch.setattr(chain.operator, "kernels", lambda kernel=kernel: kernel)
    compiled._accepted.cache_clear()
    yield ran


@pytest.mark.parametrize("name, much", [(name, None) for name in MIXERS] + [(name, 0) for name in LARGE])
def test_is_what_the_layers_are(
    name: str, much: int | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixers_cuda, "MUCH", mixers_cuda.MUCH if much is None else much)
    mixer, x = make(name)
    exact = run(copy.deepcopy(mixer).double(), x.double())
    expected = run(mixer, x)
    ran = request.getfixturevalue("stand_ins")
    for result, layers, true in zip(run(mixer, x), expected, exact, strict=True):
        # Sums that cancel lose as much in the layers, and how much depends on the processor.
        assert relative_rms(result, true) < 1e-6 + relative_rms(layers, true)
    assert ran == (CHAINS[name] * 2 if name in CHAINS else ran[:1]) and ran


def graphs_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[list[str]]]:
    """A model compiled as for CUDA graphs, and a list that fills with the operators of ours in its graphs."""
    monkeypatch.setattr(compiled, "_is_captured", lambda: True)
    torch._dynamo.reset()
    compiled._accepted.cache_clear()
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        graphs.append([target.split(".")[1] for target in targets if target.startswith("vision_mamba.")])
        return aot_eager(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def test_a_hook_on_all_modules_keeps_chains_out_of_graphs() -> None:
    def seen(x: Tensor) -> Tensor:
        return x + int(compiled._shows_layers())

    zero = torch.zeros(1)
    assert torch.compile(seen, fullgraph=True, backend="eager")(zero) == 0
    torch.compiler.reset()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert torch.compile(seen, fullgraph=True, backend="eager")(zero) == 1
    finally:
        hook.remove()


@pytest.mark.parametrize(("name", "much"), [("vmamba_blocks", None), ("vim_blocks", 0)])
def test_compiled_is_what_the_layers_are(
    name: str, much: int | None, stand_ins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixers_cuda, "MUCH", mixers_cuda.MUCH if much is None else much)
    mixer, x = make(name)
    model, graphs = graphs_of(mixer, monkeypatch)
    for batch in (2, 3, 4):  # from the second on for any
        x = torch.randn(batch, *x.shape[1:])
        for result, other in zip(run(model, x), run(mixer, x), strict=True):
            assert relative_rms(result, other) < 1e-6
    assert graphs == [CHAINS[name] * 2] * 2
    with torch.no_grad():
        assert relative_rms(model(x), mixer(x)) < 1e-6
    torch._dynamo.reset()


def test_layers_that_were_touched_run_one_by_one(stand_ins: list[str]) -> None:
    mixer, x = make("ss2d")
    seen: list[Tensor] = []
    hook = mixer.out_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mixer(x)
    assert len(seen) == 1 and not stand_ins
    hook.remove()
    mixer(x)
    mixer.out_norm = nn.LayerNorm(32)
    mixer(x)
    assert len(seen) == 1 and len(stand_ins) == 1
    assert stand_ins == ["scan_map"]


@pytest.mark.parametrize(
    ("name", "place", "make_other"),
    [
        ("ss2d", "out_proj", lambda: nn.Linear(32, 32)),
        ("ss2d", "conv2d", lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32, padding_mode="circular")),
        ("ss2d", "conv2d", lambda: nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32)),
        ("localmamba", "mixer.out_proj", lambda: nn.Linear(48, 24)),
        ("bimamba", "out_proj", lambda: nn.Linear(64, 32)),
        ("vmamba_blocks", "blocks.0.ss2d.in_proj", lambda: nn.Linear(16, 32)),
    ],
)
def test_layers_that_do_more_than_kernels_do_it(
    name: str, place: str, make_other: Callable[[], nn.Module], request: pytest.FixtureRequest
) -> None:
    mixer, x = make(name)
    other = make_other()
    if "in_proj" in place:  # of as many channels as the one it stands for
        was = mixer.get_submodule(place)
        other = nn.Linear(was.in_features, was.out_features)
    mixer.set_submodule(place, other)
    expected = run(mixer, x)
    request.getfixturevalue("stand_ins")
    for result, wanted in zip(run(mixer, x), expected, strict=True):
        assert relative_rms(result, wanted) < 1e-6


def test_a_forward_of_a_layers_own_is_called(stand_ins: list[str]) -> None:
    mixer, x = make("ss2d")
    mixer.out_proj.forward = lambda y: torch.zeros(*y.shape[:-1], 32)  # as tools do that wrap layers
    assert not mixer(x).any() and stand_ins == []


def test_blocks_that_were_touched_run_one_by_one(stand_ins: list[str]) -> None:
    model, x = make("vmamba_blocks")
    first, second = model.blocks
    first.mlp.act = nn.GELU(approximate="tanh")
    second.register_forward_hook(lambda *_: None)
    model(x)
    assert stand_ins == ["scan_map"] * 2
    first.mlp.act = nn.GELU()
    first.mlp.drop1.p = 0.5
    model(x)
    assert stand_ins == ["scan_map"] * 4
    model.eval()(x)
    assert stand_ins[4:] == [*CHAINS["vmamba_blocks"], "scan_map"]


def test_weights_are_cast_and_decays_made_at_once() -> None:
    x, weight, log = torch.zeros(2).bfloat16(), nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 3))
    half, A = weight.detach().bfloat16(), -log.detach().exp()
    with mixers.ahead(x, [weight], [log]):
        first, second = mixers_cuda.halved(weight, x.dtype), mixers_cuda.halved(weight.view(3, 2), x.dtype)
        assert first.data_ptr() == second.data_ptr() and torch.equal(first, half) and second.shape == (3, 2)
        assert torch.equal(mixers_cuda.decays_of(log.view(2, 2, 3)), A.view(2, 2, 3))
        assert torch.equal(mixers_cuda.halved(weight, torch.float16), weight.half())  # another type than that of x
    assert mixers_cuda.halved(weight, x.dtype).data_ptr() != first.data_ptr()
    assert not first.requires_grad and not mixers_cuda.cast_ahead.found


@pytest.mark.parametrize("name", ["vmamba_blocks", "vmamba_blocks_alone", "vim_blocks"])
def test_the_stream_alone_has_a_gradient(name: str, stand_ins: list[str]) -> None:
    model, x = make(name)
    x.requires_grad_()
    stream, _ = model.blocks[0].join(x, None, *model.given)
    (found,) = torch.autograd.grad(stream.sum(), x)
    assert stand_ins == CHAINS[name]
    if name != "vmamba_blocks":  # there the mixer's branch is part of it already
        assert torch.equal(found, torch.ones_like(x))


@pytest.mark.gpu
@pytest.mark.parametrize("name, much", [(name, None) for name in MIXERS] + [(name, 0) for name in LARGE])
def test_on_gpu(name: str, much: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers_cuda, "MUCH", mixers_cuda.MUCH if much is None else much)
    mixer, x = make(name)
    mixer, x = mixer.cuda(), x.cuda()
    found = run(mixer, x)
    with torch.autocast("cuda", torch.bfloat16):
        half = run(mixer, x.bfloat16())
        again = run(mixer, x.bfloat16())
        monkeypatch.setattr(fused, "_by_kernels", lambda tensors: False)
        one_by_one = run(mixer, x.bfloat16())
    with ops.use_backend("eager"):
        exact = run(mixer.double(), x.double())
        rounded = run(mixer, x.bfloat16().double())
    for i, result in enumerate(found):
        assert relative_rms(result, exact[i]) < 1e-5, i
    assert all(map(torch.equal, half, again))
    # Rounded between layers, as the layers round. A gradient of few elements may be off more by chance, all are not.
    joined, apart = (
        [relative_rms(result, other) for result, other in zip(results, rounded, strict=True)]
        for results in (half, one_by_one)
    )
    assert fmean(joined) <= 1.5 * fmean(apart) + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("name, much", [(name, None) for name in MIXERS] + [(name, 0) for name in LARGE])
def test_compiled_on_gpu(
    name: str, much: int | None, half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixers_cuda, "MUCH", mixers_cuda.MUCH if much is None else much)
    mixer, x = make(name)
    mixer, x = mixer.cuda(), x.cuda()
    with ops.use_backend("eager"):
        exact = run(mixer.double(), x.double())
    mixer = mixer.float()
    model, graphs = graphs_of(mixer, monkeypatch)
    with torch.autocast("cuda", half or torch.bfloat16, enabled=half is not None):
        x = x if half is None else x.to(half)
        found = run(model, x)
        if "localmamba" in name and half:  # compiled it is what the layers are one by one, which round between them
            monkeypatch.setattr(fused, "_by_kernels", lambda tensors: False)
        expected = run(mixer, x)
    if name in CHAINS:
        assert graphs[0] == CHAINS[name] * 2 or "m2" in name or "vssd" in name
    elif "localmamba" in name:
        assert not {"scan_map", "scan_both_ways"}.union(*CHAINS.values()) & set(graphs[0])
    else:
        assert graphs[0] == ["scan_map" if "ss2d" in name else "scan_both_ways"]
    joined, other = (
        [relative_rms(result, wanted) for result, wanted in zip(results, exact, strict=True)]
        for results in (found, expected)
    )
    assert fmean(joined) <= 1.5 * fmean(other) + (1e-5 if half is None else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("name, much", [(name, None) for name in MIXERS] + [(name, 0) for name in LARGE])
def test_compilers_are_told_what_chains_give(
    name: str, much: int | None, half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixers_cuda, "MUCH", mixers_cuda.MUCH if much is None else much)
    mixer, x = make(name)
    mixer, x = mixer.cuda(), x.cuda()

    def watched(chain: fused.Joined, kernels: Kernels) -> Kernels:
        operator = chain.operator
        assert operator is not None

        def forward(tensors: fused.Tensors, options: dict[str, Any], keep: bool) -> Any:
            promised, given = [], [None if t is None else t.detach() for t in tensors]
            mode = FakeTensorMode()
            fakes = [None if t is None else mode.from_tensor(t) for t in given]
            with torch.no_grad():
                found = operator.forward_op(given, half, **options)
                with mode:
                    promised = operator.forward_op(fakes, half, **options)
            for a, b in zip(found, promised, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                assert a.data_ptr() % 16 == 0
            return kernels.forward(tensors, options, keep)

        return kernels._replace(forward=forward)

    for chain in vars(mixers).values():
        if isinstance(chain, fused.Joined) and chain.operator is not None:
            monkeypatch.setattr(chain, "_kernels", watched(chain, chain._make_kernels()))
    with torch.autocast("cuda", half or torch.bfloat16, enabled=half is not None):
        run(mixer, x if half is None else x.to(half))
