"""LocalMamba: the published code's results on weights made by rule, on square maps and others, and its quirks."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tests import golden
from tests.tolerances import LOGITS
from vision_mamba import scans
from vision_mamba.layers import SS2D, local
from vision_mamba.layers.local import LocalMamba, RouteAttention
from vision_mamba.layers.tokens import class_place, rotation
from vision_mamba.models import localmamba, vmamba
from vision_mamba.models.localmamba import LocalVim
from vision_mamba.models.vmamba import VMamba
from vision_mamba.ops import selective_scan

# What the published code gives: made once by running it on the CPU in float32, sequential scan.
FIXTURES = json.loads((Path(__file__).parent / "fixtures" / "localmamba.json").read_text())
CASES: list[dict[str, Any]] = FIXTURES["cases"]

#: Parameters as published; the published file has no LocalVim-S with a class token, which is two vectors of 384 more.
PARAMETERS = {
    "localvim_tiny_patch16_224": 7_994_152,
    "localvim_tiny_patch16_midcls_224": 7_994_536,
    "localvim_small_patch16_224": 27_783_784,
    "localvim_small_patch16_midcls_224": 27_784_552,
    "localvmamba_tiny": 25_527_160,
    "localvmamba_small": 49_748_536,
}


def spread(tensor: Tensor, count: int) -> Tensor:
    """The values that the fixture keeps of a tensor: `count` of them, evenly spaced."""
    return tensor.detach().flatten()[torch.linspace(0, tensor.numel() - 1, min(count, tensor.numel())).long()]


def to_published(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return (localmamba if isinstance(model, LocalVim) else vmamba).to_published(tensors)


def load(model: nn.Module, published: dict[str, Tensor]) -> None:
    family = localmamba if isinstance(model, LocalVim) else vmamba
    model.load_state_dict(family.checkpoint_filter_fn({"state_dict": published}, model))


def prepare(case: dict[str, Any], **changed: Any) -> nn.Module:
    model = timm.create_model(case["model"], **case["arguments"] | changed).eval()
    state = golden.fill_state_dict(to_published(model, model.state_dict()))
    for name, factor in case["scaled"].items():  # small activations, on which the norms' epsilon shows
        state[name] = state[name] * factor
    load(model, state)
    return model


def describe(case: dict[str, Any]) -> str:
    return "-".join([case["model"], *map(str, case["input"][2:])] + ["scaled"] * bool(case["scaled"]))


def find(model: str, height: int, scaled: bool = False) -> dict[str, Any]:
    (case,) = (c for c in CASES if c["model"] == model and c["input"][2] == height and bool(c["scaled"]) is scaled)
    return case


def error(result: Tensor, expected: list[float]) -> float:
    """Largest difference of the values that were kept, relative to the largest of them."""
    return float((result - torch.tensor(expected)).abs().max()) / max(map(abs, expected))


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_published_results(case: dict[str, Any]) -> None:
    model = prepare(case)
    state = golden.fill_state_dict(to_published(model, model.state_dict()))
    assert golden.fingerprint(state) == case["weights"]
    assert sum(parameter.numel() for parameter in model.parameters()) == case["parameters"]
    gradients = case.get("gradients", {})
    x = golden.image(*case["input"]).requires_grad_(bool(gradients))
    with torch.set_grad_enabled(bool(gradients)):
        logits = model(x)
    assert error(spread(logits, 32), case["logits"]) <= LOGITS
    assert logits.argmax(1).tolist() == case["argmax"]
    assert float(logits.detach().std()) == pytest.approx(case["std"], rel=LOGITS)
    assert float(logits.detach().sum()) == pytest.approx(case["sum"], abs=LOGITS * float(logits.detach().abs().sum()))
    if gradients:
        (logits * golden.image(*logits.shape)).sum().backward()
        found = to_published(model, {n: p.grad for n, p in model.named_parameters()}) | {"input": x.grad}
        for name, expected in gradients.items():
            assert error(spread(found[name], 8), expected["values"]) <= LOGITS, name
            assert float(found[name].norm()) == pytest.approx(expected["norm"], rel=LOGITS), name


def test_every_weight_released_has_a_case_on_a_square_map_and_on_another() -> None:
    for name in PARAMETERS:
        shapes = [case["input"][2:] for case in CASES if case["model"] == name]
        if name != "localvim_small_patch16_midcls_224":
            assert [224, 224] in shapes and any(height != width for height, width in shapes)


# Mistakes that the fixtures must show: 117 patches in 9 x 13, so windows of 2 and of 7 hang over, and a class token.


def mixers(model: nn.Module) -> list[LocalMamba]:
    return [module for module in model.modules() if isinstance(module, LocalMamba)]


def one_a_for_all_routes(model: nn.Module) -> None:
    """What loading into parameters that share their storage does: the last one wins."""
    for mixer in mixers(model):
        mixer.A_log.data[:] = mixer.A_log.data[-1].clone()


def another_order_in_one_block(model: nn.Module) -> None:
    (eighth, ninth) = mixers(model)[7:9]
    eighth.scan = ninth.scan


def columns_put_back_rightly(model: nn.Module) -> None:
    for mixer in mixers(model):
        mixer.attn.misplaces = False


def mean_for_sum(model: nn.Module) -> None:
    for mixer in mixers(model):
        mixer.scale = 0.25


def class_token_one_step_on(model: nn.Module) -> None:
    for mixer in mixers(model):
        mixer.class_token = "head"


def padding_without_bias(model: nn.Module) -> None:
    """Padding steps that add nothing to the state, as where the convolution comes before the routes."""
    for mixer in mixers(model):

        def convolve(x: Tensor, table: Tensor, usual: Callable[..., Tensor] = mixer._convolve) -> Tensor:
            return usual(x, table) * (table >= 0).T[None, :, :, None]

        mixer._convolve = convolve  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "mistake",
    [
        one_a_for_all_routes,
        another_order_in_one_block,
        columns_put_back_rightly,
        mean_for_sum,
        class_token_one_step_on,
        padding_without_bias,
    ],
)
def test_the_fixtures_would_show_a_mistake(mistake: Callable[[nn.Module], None]) -> None:
    case = find("localvim_tiny_patch16_midcls_224", 144)
    model = prepare(case)
    mistake(model)
    with torch.no_grad():
        assert error(spread(model(golden.image(*case["input"])), 32), case["logits"]) > 2 * LOGITS


@pytest.mark.parametrize("changed", [{"rope": False}, {"published_quirks": False}], ids=str)
def test_the_fixtures_would_show_wrong_rotations(changed: dict[str, bool]) -> None:
    case = find("localvim_tiny_patch16_224", 150)
    with torch.no_grad():
        logits = prepare(case, **changed)(golden.image(*case["input"]))
    assert error(spread(logits, 32), case["logits"]) > 2 * LOGITS


def test_the_fixtures_would_show_a_wrong_epsilon() -> None:
    case = find("localvim_tiny_patch16_224", 224, scaled=True)
    model = prepare(case)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-6
    with torch.no_grad():
        assert error(spread(model(golden.image(*case["input"])), 32), case["logits"]) > 2 * LOGITS


# The quirks: on by request, and without effect on the maps that the weights are for.


@pytest.mark.parametrize("name", ["test_localvim", "test_localvmamba"])
def test_quirks_are_off_by_default_and_show_on_other_maps_alone(name: str) -> None:
    right, quirky = (timm.create_model(name, img_size=64, **quirk).eval() for quirk in ({}, {"published_quirks": True}))
    quirky.load_state_dict(right.state_dict())
    for size, same in (((64, 64), True), ((64, 96), False)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.allclose(right(image), quirky(image), rtol=1e-5, atol=1e-6) is same


def test_without_quirks_turning_the_image_turns_the_scans() -> None:
    """Rows of an image are columns of the turned one: true only if columns are put back at the right places."""
    rows, columns = (LocalMamba(16, f"local_{chosen}") for chosen in ("h_hf_w2_w2f", "v_vf_w2_w2f"))
    columns.load_state_dict(rows.state_dict())
    wrong = LocalMamba(16, "local_v_vf_w2_w2f", published_quirks=True)
    wrong.load_state_dict(rows.state_dict())
    scans_alone = torch.tensor([1.0, 1.0, 0.0, 0.0])
    for mixer in (rows, columns, wrong):
        mixer.attn.forward = lambda y, *_, mixer=mixer: (  # type: ignore[method-assign]
            _placed(mixer, y) * scans_alone[:, None]
        ).sum(2)
    x = torch.randn(2, 3 * 5, 16)
    turned = x.unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)
    expected = rows(x, 3, 5).unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(columns(turned, 5, 3), expected)
    assert not torch.allclose(wrong(turned, 5, 3), expected, atol=1e-4)


def _placed(mixer: LocalMamba, y: Tensor) -> Tensor:
    if not mixer.attn.misplaces:
        return y
    source = scans.COLUMNS_TWICE.indices(5, 3)[0]
    return torch.stack([y[:, source, k] if mixer.attn.misplaced[k] else y[:, :, k] for k in range(4)], 2)


# The mixer


def published_mixer(mixer: LocalMamba, order: str, u: Tensor, height: int, width: int, place: int) -> Tensor:
    """Route by route in its own order, gated there, one token of zeros for each step of padding."""
    xz = mixer.in_proj(u)
    table = scans.get(order).indices(height, width, class_token=None if place < 0 else place).long()
    parts = []
    for k, route in enumerate(table):
        last = max(
            [step + 1 for step, token in enumerate(route.tolist()) if token >= 0], default=1
        )  # then only padding
        steps = torch.where((route[:last] >= 0)[:, None], xz[:, route[:last].clamp(0)], 0.0)
        x, z = steps.transpose(1, 2).chunk(2, 1)
        x = F.pad(x, (mixer.conv_weight.shape[-1] - 1, 0))
        x = F.silu(F.conv1d(x, mixer.conv_weight[k].unsqueeze(1), mixer.conv_bias[k], groups=mixer.d_inner))
        r, B, C = (mixer.x_proj_weight[k] @ x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], 1)
        y = selective_scan(
            x, mixer.dt_weight[k] @ r, -mixer.A_log[k].exp(), B, C, mixer.D[k], z, mixer.dt_bias[k], True,
            backend="reference",
        ).transpose(1, 2)  # fmt: skip
        visited = route[:last][route[:last] >= 0]
        parts.append(torch.zeros_like(xz[..., : mixer.d_inner]).index_copy(1, visited, y[:, route[:last] >= 0]))
    return mixer.out_proj(mixer.attn(torch.stack(parts, 2), height, width, place) * mixer.scale)


@pytest.mark.parametrize("class_token", ["none", "middle", "head"])
@pytest.mark.parametrize("order", ["local_2", "local_v_vf_w2f_w7", "cross", "atrous_2"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 4)], ids=str)
def test_mixer_is_a_gated_scan_along_each_route(order: str, class_token: str, grid: tuple[int, int]) -> None:
    mixer = LocalMamba(16, order, d_state=3, class_token=class_token, average=class_token == "head").double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    place = class_place(class_token, *grid)
    u = torch.randn(2, grid[0] * grid[1] + (place >= 0), 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(u, *grid), published_mixer(mixer, order, u, *grid, place))


def test_attention_weighs_the_channels_of_every_route() -> None:
    attention = RouteAttention(16, "local_2", ratio=0.25).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    y = torch.randn(2, 6, 4, 16, dtype=torch.float64)
    expected = torch.zeros(2, 6, 16, dtype=torch.float64)
    for k in range(4):
        normed = F.layer_norm(y[:, :, k], (16,), attention.norm.weight, attention.norm.bias, 1e-5)
        hidden = F.gelu(attention.global_reduce(normed.mean(1)))
        expected += y[:, :, k] * attention.channel_select(hidden).sigmoid()[:, None]
    torch.testing.assert_close(attention(y, 2, 3), expected)


@pytest.mark.parametrize(("token", "places"), [("none", None), ("head", 0), ("middle", 7)])
def test_rotations_are_the_published_ones(token: str, places: int | None) -> None:
    sine, cosine = rotation(torch.zeros(1, 24), [3, 5], [3, 5], token)
    angles = np.zeros((3, 5, 24))
    for channel in range(24):
        pair = channel % 12 // 2
        frequency = 10000 ** (-2 * pair / 12)
        rows, columns = np.arange(3) / 3 * 14, np.arange(5) / 5 * 14
        angles[:, :, channel] = (rows[:, None] if channel < 12 else columns[None]) * frequency
    expected = torch.from_numpy(angles).view(15, 24)
    if places is not None:
        expected = torch.cat((expected[:places], torch.zeros(1, 24), expected[places:]))
    torch.testing.assert_close(sine.double(), expected.sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(cosine.double(), expected.cos(), atol=1e-5, rtol=0)


def test_rotations_add_up_from_block_to_block() -> None:
    model = timm.create_model("test_localvim", img_size=64, pos_embed=False).eval()
    for mixer in mixers(model):
        nn.init.zeros_(mixer.out_proj.weight)
    model.norm = nn.Identity()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = model.patch_embed(image).flatten(1, 2).unflatten(-1, (-1, 2))
        turned = model.forward_features(image).unflatten(-1, (-1, 2))
    sine, cosine = rotation(torch.zeros(1, 48), [4, 4], [4, 4], "none")
    turns = torch.complex(cosine, sine)[:, ::2] ** len(model.blocks)
    expected = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=1e-4)


# Sizes


def test_class_token_keeps_its_row_at_other_sizes() -> None:
    arguments = dict(class_token="middle", global_pool="token", rope=False)
    source = timm.create_model("test_localvim", img_size=64, **arguments)
    model = timm.create_model("test_localvim", img_size=(48, 80), **arguments)
    load(model, to_published(source, source.state_dict()))
    before, after = source.pos_embed.detach(), model.pos_embed.detach()
    assert torch.equal(after[:, 7], before[:, 8])  # the middle of 15 and of 16 patches
    patches = torch.cat((before[:, :8], before[:, 9:]), 1)
    expected = resample_abs_pos_embed(patches, (3, 5), (4, 4), num_prefix_tokens=0)
    torch.testing.assert_close(torch.cat((after[:, :7], after[:, 8:]), 1), expected)


def test_exported_it_takes_any_size_that_its_patches_tile() -> None:
    model = timm.create_model("test_localvim", depth=1, scan_order="local_7").eval()
    sides = {2: 16 * torch.export.Dim("rows", min=2, max=32), 3: 16 * torch.export.Dim("columns", min=2, max=32)}
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(1, 3, 48, 80),), dynamic_shapes={"x": sides})
        torch.testing.assert_close(exported.module()(image), model(image))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_localvim", dict(depth=1, scan_order="local_v_vf_w2_w7f")),
        ("test_localvim", dict(depth=1, scan_order="local_v_vf_w2_w7f", published_quirks=True)),
        ("test_localvmamba", dict(dims=(8,), depths=(1,), scan_order="local_v_vf_w2_w7f", published_quirks=True)),
    ],
)
def test_plain_torch_twin_for_exporters_agrees(name: str, arguments: dict[str, Any]) -> None:
    model, twin = (timm.create_model(name, **arguments, exportable=exportable).eval() for exportable in (False, True))
    twin.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 16, 32) if name == "test_localvmamba" else torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        torch.testing.assert_close(twin(image), model(image))
        exported = torch.export.export(twin, (image,))
    assert not any("vision_mamba" in str(node.target) for node in exported.graph.nodes)


# Checkpoints


def test_published_parameters_that_share_their_storage_load_apart(tmp_path: Path) -> None:
    """The published code makes the four A_log of a mixer of one tensor; loaded into that, the last one would win."""
    source, model = timm.create_model("test_localvim"), timm.create_model("test_localvim")
    state = to_published(source, source.state_dict())
    shared = torch.rand_like(state["layers.0.mixer.A_log_0"])
    for k in range(4):
        state[f"layers.0.mixer.A_log_{k}"] = shared
        state[f"layers.1.mixer.A_log_{k}"] = torch.full_like(shared, float(k))
    torch.save({"state_dict": state}, tmp_path / "shared.ckpt")
    load(model, torch.load(tmp_path / "shared.ckpt")["state_dict"])
    first, second = (block.mixer.A_log for block in model.blocks[:2])
    assert second[:, 0, 0].tolist() == [0, 1, 2, 3]
    with torch.no_grad():
        first[0].zero_()
    assert torch.equal(first[1:], shared.expand(3, -1, -1)) and not first[0].any()


def test_a_published_file_loads_strictly(tmp_path: Path) -> None:
    source = timm.create_model("test_localvim")
    sine, cosine = rotation(torch.zeros(1, 48), [10, 10], [10, 10], "none")
    state = to_published(source, source.state_dict()) | {"rope.freqs_cos": cosine, "rope.freqs_sin": sine}
    card = dict(file=str(tmp_path / "published.ckpt"))
    torch.save({"state_dict": state}, card["file"])
    model = timm.create_model("test_localvim", pretrained=True, pretrained_cfg_overlay=card)
    own, theirs = model.state_dict(), source.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)

    torch.save({"state_dict": state | {"rope.freqs_cos": sine}}, card["file"])
    with pytest.raises(
        ValueError, match=r"rope\.freqs_cos are not the rotary embedding of a square grid and 48 channels"
    ):
        timm.create_model("test_localvim", pretrained=True, pretrained_cfg_overlay=card)
    with pytest.raises(ValueError, match=r"\(rope\.freqs_cos, rope\.freqs_sin\) not used"):
        load(timm.create_model("test_localvim", rope=False), state)
    del state["layers.2.mixer.conv1d_3.weight"], state["layers.1.mixer.attn.norm.bias"]
    with pytest.raises(ValueError, match=r"\(blocks\.1\.mixer\.attn\.norm\.bias, blocks\.2\.mixer\.conv_weight\)"):
        load(timm.create_model("test_localvim"), state)


@pytest.mark.parametrize("name", ["test_localvim", "test_localvmamba"])
def test_every_parameter_has_its_published_name(name: str) -> None:
    source, model = timm.create_model(name), timm.create_model(name)
    state = to_published(source, source.state_dict())
    load(model, state)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in source.state_dict().items())
    key = (
        "layers.0.mixer.conv1d_3.weight"
        if name == "test_localvim"
        else "layers.0.blocks.0.op.multi_scan.attn.norm.bias"
    )
    assert key in state


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("published", "ours", "file"),
    [
        ("local_vim_tiny", "localvim_tiny_patch16_224", "local_vim_tiny.ckpt"),
        ("local_vim_tiny_middle_cls_token", "localvim_tiny_patch16_midcls_224", "local_vim_tiny_middle_cls_token.ckpt"),
        ("local_vim_small", "localvim_small_patch16_224", None),
        ("local_vssm_tiny", "localvmamba_tiny", None),
        ("local_vssm_small", "localvmamba_small", "local_vssm_small.ckpt"),
    ],
)
def test_published_names_stand_for_ours(published: str, ours: str, file: str | None) -> None:
    assert published not in timm.list_models()
    with pytest.warns(UserWarning, match=f"{published} to current {ours}"):
        model = timm.create_model(published, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[ours]
    card = timm.get_pretrained_cfg(ours)
    assert card.license == "apache-2.0" and card.paper_ids == "arXiv:2403.09338"
    assert card.url.rpartition("/")[2] == file if file else not card.url and not card.has_weights


# Arguments


@pytest.mark.parametrize("name", ["test_localvim", "test_localvmamba"])
def test_an_order_for_every_block(name: str) -> None:
    orders = (
        ["local_2", "cross", "snake"] if name == "test_localvim" else ["local_2", "cross", "local_7", "snake", "cross"]
    )
    model = timm.create_model(name, scan_order=orders)
    mixing = (m for m in model.modules() if isinstance(m, (LocalMamba, SS2D)))
    assert [mixer.scan.order for mixer in mixing] == orders
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 1000)
    refusal = ValueError if isinstance(model, VMamba) else AssertionError
    with pytest.raises(refusal, match=r"scan_order must be one name or one for each of the [35] blocks, got 2"):
        timm.create_model(name, scan_order=["cross", "cross"])


# Initialisation


@pytest.mark.parametrize("name", FIXTURES["initialisation"])
def test_initialisation_is_the_published_one(name: str) -> None:
    """Mean, spread and bounds of what the published code fills every parameter of a block and the rest with."""
    torch.manual_seed(0)
    model = {
        "test_localvim": lambda: timm.create_model(
            name, embed_dim=96, depth=4, scan_order="local_2", class_token="middle", rope=False
        ),
        "test_localvmamba": lambda: timm.create_model(name, dims=(64, 64, 64, 128)),
    }[name]()
    model.init_weights()  # once more, as after storage was made anew
    ours = to_published(model, dict(model.named_parameters()))
    for key, (mean, deviation, low, high) in FIXTURES["initialisation"][name].items():
        values = ours[key].detach().double()
        assert float(values.std(correction=0)) == pytest.approx(deviation, rel=0.1, abs=1e-7), key
        assert float(values.mean()) == pytest.approx(mean, rel=1e-4, abs=0.25 * deviation), key
        assert float(values.min()) == pytest.approx(low, rel=0.35, abs=1e-6), key
        assert float(values.max()) == pytest.approx(high, rel=0.35, abs=1e-6), key


@pytest.mark.parametrize("module", [localmamba, local], ids=lambda module: module.__name__)
def test_its_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
