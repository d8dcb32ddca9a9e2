"""Vim against the published code's logits and gradients, and what is its own: a class token among the patches."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from tests import golden
from tests.tolerances import LOGITS
from vision_mamba.layers import BiMamba
from vision_mamba.layers.tokens import rotation
from vision_mamba.models import vim
from vision_mamba.models.vim import VisionMamba, checkpoint_filter_fn, published_names, to_published
from vision_mamba.ops import conv_both_ways, selective_scan

FIXTURES = Path(__file__).parent / "fixtures"
FULL = ["vim_tiny"]  # all 24 blocks at 224 pixels
SHORT = ["vim_small", "vim_base", "vim_tiny_stride8", "vim_tiny_faint"]
#: As first published: tokens turned by their places, a class token in front or none; and one at either end.
LEGACY = ["vim_legacy_head", "vim_legacy_mean", "vim_legacy_double"]
#: Largest difference of a gradient's elements relative to the largest, and of its norm; measured below 3e-6.
GRADIENTS = 1e-4


def by_published_names(model: VisionMamba, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_published(tensors, partial(published_names, class_token=model.class_token))


def published_weights(model: VisionMamba, scaled: dict[str, float]) -> tuple[dict[str, Tensor], str]:
    """The rule's weights by their published names, a few of them scaled, and the fingerprint before that."""
    state = golden.fill_state_dict(by_published_names(model, model.state_dict()))
    return {name: tensor * scaled.get(name, 1.0) for name, tensor in state.items()}, golden.fingerprint(state)


def prepare(case: str) -> tuple[dict[str, Any], VisionMamba, Tensor]:
    """What the published code gave, and our model and input for it."""
    expected = json.loads((FIXTURES / f"{case}.json").read_text())
    model = timm.create_model(expected["model"], **expected["arguments"]).eval()
    weights, fingerprint = published_weights(model, expected["scaled"])
    assert fingerprint == expected["weights"]
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))
    return expected, model, golden.image(*expected["image"])


def difference(logits: Tensor, expected: dict[str, Any]) -> float:
    """Largest difference of the logits that were written down, relative to the largest of them."""
    ours, theirs = logits.detach()[:, expected["logits"]["classes"]], torch.tensor(expected["logits"]["values"])
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("case", FULL + SHORT + LEGACY)
def test_published_logits_and_gradients(case: str) -> None:
    expected, model, image = prepare(case)
    gradients = expected.get("gradients", {})
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    pixels = image.requires_grad_()
    with torch.set_grad_enabled(bool(gradients)):
        logits = model(pixels)
    wanted = expected["logits"]
    assert list(logits.shape) == wanted["shape"]
    assert difference(logits, expected) <= LOGITS
    assert logits.argmax(1).tolist() == wanted["argmax"]
    assert logits.std().item() == pytest.approx(wanted["std"], rel=LOGITS)
    assert logits.sum().item() == pytest.approx(wanted["sum"], abs=LOGITS * logits.abs().sum().item())
    if not gradients:
        return
    (logits.square().sum() / 2).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    ours = by_published_names(model, found) | {"pixels": pixels.grad}
    for name, wanted in gradients.items():
        error = (ours[name].flatten()[wanted["places"]] - torch.tensor(wanted["values"])).abs().max().item()
        assert error <= GRADIENTS * wanted["max"], f"{name}: {error / wanted['max']:.1e} of the largest"
        assert ours[name].double().norm().item() == pytest.approx(wanted["norm"], rel=GRADIENTS), name


def swap_x_and_z(model: VisionMamba) -> None:
    for block in model.blocks:
        block.mixer.in_proj.weight.data = block.mixer.in_proj.weight.data.roll(block.mixer.d_inner, 0)


def swap_ways(model: VisionMamba) -> None:
    for block in model.blocks:
        for parameter in block.mixer.parameters(recurse=False):
            parameter.data = parameter.data.flip(0)


def swap_b_and_c(model: VisionMamba) -> None:
    for block in model.blocks:
        dt, B, C = block.mixer.x_proj_weight.data.split([block.mixer.dt_rank, 16, 16], 1)
        block.mixer.x_proj_weight.data = torch.cat((dt, C, B), 1)


def sum_for_mean(model: VisionMamba) -> None:
    for block in model.blocks:
        block.mixer.scale = 1.0


def finer_epsilon(model: VisionMamba) -> None:
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-6


def class_token_at_the_head(model: VisionMamba) -> None:
    model.class_token = "head"


def no_bias_of_the_step(model: VisionMamba) -> None:
    for block in model.blocks:
        block.mixer.dt_bias.data.zero_()


@pytest.mark.parametrize(
    "mistake",
    [
        swap_x_and_z,
        swap_ways,
        swap_b_and_c,
        sum_for_mean,
        finer_epsilon,
        class_token_at_the_head,
        no_bias_of_the_step,
    ],
)
def test_the_fixtures_would_show_a_mistake(mistake: Callable[[VisionMamba], None]) -> None:
    expected, model, image = prepare("vim_tiny_faint")  # tokens so small that the norms' epsilon counts
    mistake(model)
    with torch.no_grad():
        assert difference(model(image), expected) > 100 * LOGITS


@pytest.mark.parametrize("place", [-1, 1])
def test_the_fixtures_would_show_a_class_token_one_step_off(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def insert(patches: Tensor, token: Tensor, class_token: str) -> Tensor:
        middle = patches.shape[1] // 2 + place
        return torch.cat((patches[:, :middle], token, patches[:, middle:]), 1)

    def first(tokens: Tensor, class_token: str) -> Tensor:
        middle = (tokens.shape[1] - 1) // 2 + place
        return torch.cat((tokens[:, middle : middle + 1], tokens[:, :middle], tokens[:, middle + 1 :]), 1)

    expected, model, image = prepare("vim_tiny_faint")
    monkeypatch.setattr(vim, "insert_class", insert)
    monkeypatch.setattr(vim, "class_first", first)
    with torch.no_grad():
        assert difference(model(image), expected) > 100 * LOGITS


@pytest.mark.parametrize("class_token", ["middle", "head", "double"])
def test_a_head_of_the_class_token_needs_no_other(class_token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VisionMamba(32, 8, embed_dim=16, depth=2, num_classes=3, class_token=class_token)
    images = torch.randn(2, 3, 24, 40)
    expected = model.forward_head(model.forward_features(images))
    normed: list[int] = []
    given = model._class_features
    monkeypatch.setattr(vim, "eager_on_gpu", lambda x: True)
    monkeypatch.setattr(model, "_class_features", lambda x: normed.append(given(x).shape[1]) or given(x))
    assert torch.equal(model(images), expected)
    assert normed == [model.num_prefix_tokens]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vim_tiny_patch16_224", 7_148_008),
        ("vim_small_patch16_224", 25_796_584),
        ("vim_base_patch16_224", 97_598_440),
        ("vim_tiny_patch16_stride8_224", 7_250_344),
        ("vim_small_patch16_stride8_224", 26_001_256),
    ],
)
def test_number_of_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == parameters


def test_published_name_is_an_alias() -> None:
    old = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    assert old not in timm.list_models()
    with pytest.warns(UserWarning, match=r"vim_tiny_patch16_224\.hustvl_in1k"):
        model = timm.create_model(old, device="meta")
    assert model.pretrained_cfg["hf_hub_filename"] == "vim_t_midclstok_76p1acc.pth"


# The mixer


FIRST = "224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual"


@pytest.mark.parametrize(
    ("old", "ours", "parameters"),
    [
        (f"vim_tiny_patch16_{FIRST}", "vim_tiny_patch16_rope_224", 7_147_624),
        (f"vim_tiny_patch16_{FIRST}_with_cls_token", "vim_tiny_patch16_rope_cls_224", 7_148_008),
        (f"vim_tiny_patch8_{FIRST}_with_cls_token", "vim_tiny_patch8_rope_cls_224", None),
        (f"vim_small_patch16_{FIRST}", "vim_small_patch16_rope_224", 25_795_816),
    ],
)
def test_first_published_names_are_aliases(old: str, ours: str, parameters: int | None) -> None:
    with torch.device("meta"), pytest.warns(UserWarning, match=ours):
        model = timm.create_model(old)
    assert model.rope and all(block.mixer.scale == 1.0 for block in model.blocks)
    assert (model.class_token, model.global_pool) == (("head", "token") if "cls" in ours else ("none", "avg"))
    assert parameters is None or sum(p.numel() for p in model.parameters()) == parameters


def test_normed_columns_keep_large_activations_from_the_scan() -> None:
    for norm_columns in (False, True):
        mixer = BiMamba(16, norm_columns=norm_columns)
        square = sum(c.square().sum(-1) for c in mixer.columns(1e3 * torch.randn(1, 5, 2, 32)))
        square = square / (mixer.dt_rank + 2 * mixer.d_state)
        assert torch.allclose(square, torch.ones(()), atol=1e-3) is norm_columns


@pytest.mark.parametrize("name", ["vim_tiny_patch16_steady_224", "vmamba_tiny_steady", "localvmamba_tiny_steady"])
def test_our_own_models_say_that_they_are_not_published(name: str) -> None:
    card = timm.get_pretrained_cfg(name)
    assert "not a published model" in card.description and card.tag == "untrained" and not card.has_weights
    with torch.device("meta"):
        model = timm.create_model(name)
    mixers = [module for module in model.modules() if hasattr(module, "norm_columns")]
    assert mixers and all(mixer.norm_columns and mixer.scale == 1 / mixer.routes for mixer in mixers)


def test_conv_both_ways_is_two_causal_convolutions() -> None:
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(2, 6, 4), torch.randn(2, 6)

    def causal(x: Tensor, k: int) -> Tensor:
        y = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[k].unsqueeze(1), bias[k], groups=6)
        return F.silu(y).transpose(1, 2)

    ours = conv_both_ways(x, weight, bias)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours[:, :, 0], causal(x, 0))
    torch.testing.assert_close(ours[:, :, 1], causal(x.flip(1), 1).flip(1))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_mixer_is_two_gated_scans_of_the_sequence_and_its_reverse(length: int, average: bool) -> None:
    mixer = BiMamba(32, d_state=5, average=average, dtype=torch.float64)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    u = torch.randn(2, length, 32, dtype=torch.float64)

    def branch(xz: Tensor, k: int) -> Tensor:
        """One way as published: (B, 2 D, L), gated by its own order of z."""
        x, z = xz.chunk(2, 1)
        x = F.pad(x, (3, 0))
        x = F.silu(F.conv1d(x, mixer.conv_weight[k].unsqueeze(1), mixer.conv_bias[k], groups=mixer.d_inner))
        r, B, C = (mixer.x_proj_weight[k] @ x).split([mixer.dt_rank, 5, 5], 1)
        return selective_scan(
            x, mixer.dt_weight[k] @ r, -mixer.A_log[k].exp(), B, C, mixer.D[k], z, mixer.dt_bias[k], True,
            backend="reference",
        )  # fmt: skip

    xz = mixer.in_proj(u).transpose(1, 2)
    y = branch(xz, 0) + branch(xz.flip(-1), 1).flip(-1)
    torch.testing.assert_close(mixer(u), mixer.out_proj((y / 2 if average else y).transpose(1, 2)))


def test_initial_weights() -> None:
    model = timm.create_model("test_vim", depth=9, embed_dim=64, dtype=torch.bfloat16)
    for mixer in (block.mixer for block in model.blocks):
        assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_bias.dtype == torch.float32
        assert mixer.in_proj.weight.dtype == mixer.conv_weight.dtype == torch.bfloat16
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand_as(mixer.A_log))
        assert torch.equal(mixer.D, torch.ones_like(mixer.D))
        dt = F.softplus(mixer.dt_bias[0])
        assert 1e-3 <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 0.1 + 1e-6
        assert not mixer.dt_bias[1].any()
        for weight, bound in (
            (mixer.out_proj.weight, 128**-0.5 / 3),
            (mixer.x_proj_weight, 128**-0.5),
            (mixer.dt_weight, 4**-0.5),
            (mixer.conv_weight, 0.5),
        ):
            assert 0.9 * bound < weight.abs().max() <= 1.01 * bound
    assert not model.head.bias.any() and not model.patch_embed.proj.bias.any()
    for weight in (model.pos_embed, model.cls_token, model.head.weight):
        assert 0.01 < weight.float().std() < 0.03


# Sizes, and the class token among the patches


def test_class_token_comes_first_and_patches_keep_their_places() -> None:
    """Without blocks, what comes out is what went in: each token can be told by its position embedding."""
    model = timm.create_model("test_vim", img_size=(48, 80), depth=4).eval()
    model.blocks = nn.Sequential()
    model.norm = nn.Identity()
    nn.init.zeros_(model.patch_embed.proj.weight)
    nn.init.zeros_(model.cls_token)
    places = torch.arange(16.0)  # 3 x 5 patches, the class token at 7
    model.pos_embed.data = places[None, :, None].expand(1, 16, 48).contiguous()
    first = model.forward_features(torch.randn(2, 3, 48, 80))[0, :, 0]
    assert first.tolist() == [7, 0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("class_token", ["middle", "head", "none", "double"])
def test_pos_embed_is_resampled_without_the_class_token(class_token: str) -> None:
    pool = "avg" if class_token == "none" else "token"
    model = timm.create_model("test_vim", img_size=(48, 80), class_token=class_token, global_pool=pool).eval()
    before = model.pos_embed.detach().clone()
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        dynamic = model(image)
        model.set_input_size((96, 64))
        torch.testing.assert_close(model(image), dynamic)
    after = model.pos_embed.detach()
    # 15 patches became 24: places 7 and 12 in the middle.
    for old, new in {"middle": [(7, 12)], "head": [(0, 0)], "none": [], "double": [(16, 25), (0, 0)]}[class_token]:
        assert torch.equal(after[:, new], before[:, old])
        before, after = (torch.cat((table[:, :p], table[:, p + 1 :]), 1) for table, p in ((before, old), (after, new)))
    torch.testing.assert_close(after, resample_abs_pos_embed(before, (6, 4), (3, 5), num_prefix_tokens=0))


def test_a_checkpoint_of_another_size_and_patch_loads() -> None:
    source = timm.create_model("test_vim", img_size=64)
    model = timm.create_model("test_vim", img_size=(96, 32), patch_size=8)
    state = checkpoint_filter_fn(source.state_dict(), model)
    model.load_state_dict(state)
    assert torch.equal(model.pos_embed[:, 24], source.pos_embed[:, 8])
    assert model.patch_embed.proj.weight.shape[-2:] == (8, 8)


def test_a_checkpoint_of_the_same_number_of_patches_in_another_grid_is_resampled() -> None:
    source = timm.create_model("test_vim", img_size=64)
    model = timm.create_model("test_vim", img_size=(32, 128), pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    state = checkpoint_filter_fn(source.state_dict(), model)
    assert not torch.allclose(state["pos_embed"], source.pos_embed)
    assert torch.equal(state["pos_embed"][:, 8], source.pos_embed[:, 8])


@pytest.mark.parametrize("stride", [16, 8, 5])
@pytest.mark.parametrize("size", [(5, 7), (16, 16), (33, 50), (64, 40)])
def test_any_size_is_taken_and_every_pixel_seen(size: tuple[int, int], stride: int) -> None:
    model = timm.create_model("test_vim", stride=stride, depth=1)
    image = torch.randn(1, 3, *size, requires_grad=True)
    rows, columns = model.patch_embed.dynamic_feat_size(size)
    tokens = model.forward_features(image)
    assert tokens.shape == (1, 1 + rows * columns, 48)
    tokens.square().sum().backward()
    assert image.grad.abs().sum(1).min() > 0
    for count, side in zip((rows, columns), size, strict=True):
        assert count == 1 or (count - 2) * stride + 16 < side, "one patch fewer would do"


def test_a_fixed_size_is_kept_on_request() -> None:
    model = timm.create_model("test_vim", img_size=64, dynamic_img_size=False)
    model(torch.randn(1, 3, 64, 64))
    with pytest.raises(AssertionError, match=r"images must be \(64, 64\), got \(64, 80\); use dynamic_img_size"):
        model(torch.randn(1, 3, 64, 80))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_token": "tail"}, "class_token must be one of"),
        ({"global_pool": "catavgmax"}, "global_pool must be one of"),
        ({"class_token": "none"}, "needs a class token"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        timm.create_model("test_vim", device="meta", **arguments)
    with pytest.raises(ValueError, match="stride must be from 1 to the patch size"):
        timm.create_model("test_vim", device="meta", stride=17)


def test_taps_are_maps_of_the_patches_and_give_the_class_token_beside() -> None:
    model = timm.create_model("test_vim").eval()
    image = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        features, taps = model.forward_intermediates(image, indices=[1, 3], return_prefix_tokens=True, norm=True)
        tokens = model.forward_features(image)
    patches, prefix = taps[-1]
    assert patches.shape == (2, 48, 3, 5) and prefix.shape == (2, 1, 48)
    torch.testing.assert_close(features, tokens)
    torch.testing.assert_close(torch.cat((prefix, patches.flatten(2).transpose(1, 2)), 1), tokens)


# Checkpoints


def test_a_published_training_file_loads_strictly(tmp_path: Path) -> None:
    source = timm.create_model("test_vim")
    file = tmp_path / "published.pth"
    training = {"model": to_published(source.state_dict()), "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(training, file)
    model = timm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), num_classes=7)
    own, theirs = model.state_dict(), source.state_dict()
    assert own["head.weight"].shape == (7, 48)
    assert all(torch.equal(own[name], theirs[name]) for name in own if not name.startswith("head."))

    gone = training["model"].pop("layers.2.mixer.conv1d_b.weight")
    training["model"]["rope.freqs_cos"] = gone
    torch.save(training, file)
    with pytest.raises(ValueError) as error:
        timm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), num_classes=7)
    for named in ("blocks.2.mixer.conv_weight", "layers.2.mixer.conv1d.weight", "rope.freqs_cos"):
        assert named in str(error.value)
    assert "blocks.1" not in str(error.value)


def test_our_own_state_passes_the_filter_unchanged() -> None:
    for arguments in ({}, {"num_classes": 0}, {"class_token": "none", "global_pool": "avg", "init_values": 0.1}):
        model = timm.create_model("test_vim", **arguments)
        state = model.state_dict()
        filtered = checkpoint_filter_fn(state, model)
        assert filtered.keys() == state.keys() and all(torch.equal(filtered[name], state[name]) for name in state)


def test_the_first_published_file_brings_its_rotations() -> None:
    """It holds their tables, for 14 by 14 patches of the width; ours are computed, and any others are refused."""
    model = timm.create_model("test_vim", class_token="head", rope=True, average_routes=False)
    tables = rotation(torch.zeros(1, 48), [14, 14], [14, 14], "none")
    published = by_published_names(model, model.state_dict()) | {
        "rope.freqs_sin": tables[0],
        "rope.freqs_cos": tables[1],
    }
    assert checkpoint_filter_fn({"model": published}, model).keys() == model.state_dict().keys()
    for wrong in (tables[1], tables[0, :195], tables[0, :, :40]):
        with pytest.raises(ValueError, match="are not the rotary embedding of a square grid and 48 channels"):
            checkpoint_filter_fn(published | {"rope.freqs_sin": wrong, "rope.freqs_cos": wrong}, model)
    still = timm.create_model("test_vim", class_token="head")
    with pytest.raises(ValueError, match=r"rope\.freqs_\w+, rope\.freqs_\w+\) not used"):
        checkpoint_filter_fn(published, still)


def test_two_class_tokens_leave_first_and_pool_to_their_mean() -> None:
    model = timm.create_model("test_vim", img_size=(48, 80), class_token="double").eval()
    image = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        tokens = model.forward_features(image)
        _, taps = model.forward_intermediates(image, indices=[3], return_prefix_tokens=True, norm=True)
        torch.testing.assert_close(model(image), model.head(tokens[:, :2].mean(1)))
    patches, prefix = taps[0]
    assert patches.shape == (2, 48, 3, 5) and prefix.shape == (2, 2, 48)
    torch.testing.assert_close(torch.cat((prefix, patches.flatten(2).transpose(1, 2)), 1), tokens)
    with pytest.raises(ValueError, match="LocalMamba: class_token must be 'middle', 'head' or 'none', got 'double'"):
        timm.create_model("test_vim", class_token="double", scan_order="cross")


def test_every_parameter_has_its_published_name() -> None:
    model = timm.create_model("test_vim", init_values=0.1)
    state = model.state_dict()
    published = to_published(state)
    assert len(published) == len([name for ours in state for name in published_names(ours)])
    assert published["layers.0.mixer.gamma"].shape == (48,) and published["layers.0.mixer.conv1d_b.weight"].dim() == 3
    back = checkpoint_filter_fn(published, model)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


# Training


def test_stream_stays_float32_under_autocast() -> None:
    model = timm.create_model("test_vim").eval()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append((args[0].dtype, out.dtype)))
    mixed: list[torch.dtype] = []
    model.blocks[0].mixer.out_proj.register_forward_hook(lambda layer, args, out: mixed.append(args[0].dtype))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(image)
    assert set(seen) == {(torch.float32, torch.float32)} and mixed[-1] == torch.bfloat16
    assert (half - exact).abs().max() < 0.03 * exact.abs().max()


def test_drop_path_rises_from_none_to_its_rate() -> None:
    model = timm.create_model("test_vim", depth=5, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_state_space_parameters_are_not_decayed() -> None:
    model = timm.create_model("test_vim")
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name.removeprefix("blocks.0.") for name, p in model.named_parameters() if id(p) in decayed}
    names = {name for name in names if not name.startswith("blocks.")}
    mixer = {f"mixer.{n}" for n in ("in_proj.weight", "conv_weight", "x_proj_weight", "dt_weight", "out_proj.weight")}
    assert names == {"patch_embed.proj.weight", "head.weight"} | mixer


# Export


def test_exported_it_takes_any_size_that_its_patches_tile() -> None:
    model = timm.create_model("test_vim", depth=1).eval()
    sides = {2: 16 * torch.export.Dim("rows", min=2, max=32), 3: 16 * torch.export.Dim("columns", min=2, max=32)}
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(1, 3, 48, 80),), dynamic_shapes={"x": sides})
        torch.testing.assert_close(exported.module()(image), model(image))


def test_plain_torch_twin_for_exporters_agrees() -> None:
    model = timm.create_model("test_vim", depth=2).eval()
    twin = timm.create_model("test_vim", depth=2, exportable=True).eval()
    twin.load_state_dict(model.state_dict())
    assert all(block.mixer.scan.exportable for block in twin.blocks)
    image = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        torch.testing.assert_close(twin(image), model(image))
