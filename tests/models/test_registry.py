"""What a registered model must do beyond timm's own tests: every one without storage, the small ones for real."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_model_input_config
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from tests.registered import ALL, SMALL, ends_in_tokens, family
from vision_mamba.models import vmamba

# Parameters of the mixers that must not decay and stay float32: A (as its logarithm), D, the bias of the step size.
SPECIAL = re.compile(r"(^|[._])(A_logs?|A_b_log|Ds?|D_b|dt\w*_bias|dt\w*\.bias)$")
ODD = (2, 3, 48, 33)  # neither square nor a multiple of any patch

every_model = pytest.mark.parametrize("name", ALL)
small_model = pytest.mark.parametrize("name", SMALL)


def create(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def on_meta(name: str, **options) -> nn.Module:
    """The model without storage: shapes and types are those of the real one, and nothing is computed."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


def spread(model: nn.Module) -> nn.Module:
    """Move every parameter away from where it was initialised, so that one that is lost or swapped shows."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def special(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if SPECIAL.search(name)}


def weights_file(model: nn.Module, path: Path) -> dict:
    """Save a model's weights, as the part of a card that says where they are."""
    torch.save(model.state_dict(), path)
    return dict(file=str(path))


# Every model, on the meta device.


@every_model
def test_state_space_parameters_do_not_decay(name: str) -> None:
    model = on_meta(name)
    found = special(model)
    blocks = sum(bool(re.search(r"A_logs?$", parameter)) for parameter in found)
    assert blocks > 0 and len(found) >= 3 * blocks  # A, D and the step size's bias of each mixer
    patterns = model.no_weight_decay()
    assert [p for p in found if not any(fnmatch.fnmatch(p, pattern) for pattern in patterns)] == []
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    decaying = {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
    assert decaying and decaying.isdisjoint(map(id, found.values()))


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("test_vssd", "test_plainmamba")])
def test_weight_decay_reaches_on_request_what_the_published_reached(name: str) -> None:
    """There nothing was exempt but vectors, biases, position embeddings and class tokens."""
    model = on_meta(name, published_weight_decay=True)
    module = sys.modules[type(model).__module__ if name != "test_efficientvmamba" else vmamba.__name__]
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    decaying = {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
    for own, parameter in model.named_parameters():
        theirs = module.to_published({own: parameter})
        decayed = [
            tensor.dim() > 1 and not published.endswith((".bias", "pos_embed", "cls_token"))
            for published, tensor in theirs.items()
        ]
        assert set(decayed) == {id(parameter) in decaying}, own


@every_model
def test_layer_decay_reaches_every_parameter(name: str) -> None:
    model = on_meta(name)
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.8).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scales = sorted({group["lr_scale"] for group in groups})
    assert len(scales) > 4 and scales[-1] == 1
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    assert all(group["lr_scale"] == 1 for group in groups if head & set(map(id, group["params"])))


@every_model
def test_state_space_parameters_are_made_in_float32(name: str) -> None:
    model = on_meta(name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in special(model).values()} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters()}


@every_model
def test_shapes_follow_the_arguments(name: str) -> None:
    model = on_meta(name, in_chans=5, num_classes=7)
    assert model(torch.empty(2, 5, 48, 33, device="meta")).shape == (2, 7)


@every_model
def test_feature_pyramids_have_the_promised_shapes(name: str) -> None:
    model = on_meta(name, features_only=True)
    maps = model(torch.empty(1, 3, 192, 128, device="meta"))
    assert len(maps) >= 3
    for tap, info in zip(maps, model.feature_info.get_dicts(), strict=True):
        channels, height, width = tap.shape[1:]
        assert channels == info["num_chs"]
        # One fewer where overlapping patches end at the edge.
        assert height in (192 // info["reduction"], 192 // info["reduction"] - 1)
        assert width in (128 // info["reduction"], 128 // info["reduction"] - 1)


# The small models, for real.


@small_model
@pytest.mark.parametrize("size", [(32, 32), (48, 33), (17, 80), (5, 3), (1, 1)])
def test_any_image_size_runs_forward_and_backward(name: str, size: tuple[int, int]) -> None:
    model = create(name, num_classes=3)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@small_model
def test_images_of_a_batch_do_not_see_each_other(name: str) -> None:
    model, x = spread(create(name)).eval(), torch.randn(ODD)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), model(x), rtol=1e-4, atol=1e-5)


@small_model
def test_two_runs_agree_to_the_last_bit(name: str) -> None:
    model, x = spread(create(name)).eval(), torch.randn(ODD)

    def run() -> list[Tensor]:
        logits = model(x)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    assert all(map(torch.equal, run(), run()))


@small_model
def test_reset_classifier_keeps_the_pool(name: str) -> None:
    model, x = spread(create(name, global_pool="max")).eval(), torch.randn(ODD)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(5)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
        assert model(x).shape == (2, 5)
        model.reset_classifier(5, "avg")
        assert not torch.allclose(model.forward_head(model.forward_features(x), pre_logits=True), pooled)


@small_model
def test_an_unknown_pool_is_refused_at_once(name: str) -> None:
    with pytest.raises(AssertionError):
        create(name, global_pool="median")
    model = create(name)
    with pytest.raises(AssertionError):
        model.reset_classifier(5, "median")


@small_model
@pytest.mark.parametrize("features_only", [False, True])
def test_checkpointing_changes_no_gradient(name: str, features_only: bool) -> None:
    x = torch.randn(ODD)
    found = []
    for checkpointing in (False, True):
        model = create(name, features_only=features_only).train()
        (model.model if features_only else model).set_grad_checkpointing(checkpointing)
        outputs = model(x) if features_only else [model(x)]
        sum(output.square().mean() for output in outputs).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])


@small_model
def test_pruned_models_have_no_idle_parameters(name: str) -> None:
    model, x = create(name, drop_rate=0.5), torch.randn(ODD)
    last = len(model.feature_info) - 1
    for indices, prune_norm in (([0], False), ([last], False), (list(range(last + 1)), True)):
        pruned = copy.deepcopy(model).train()
        taken = pruned.prune_intermediate_layers(indices, prune_norm=prune_norm)
        maps = pruned.forward_intermediates(x, indices=taken, norm=not prune_norm, intermediates_only=True)
        sum(tap.sum() for tap in maps).backward()
        assert [n for n, p in pruned.named_parameters() if p.grad is None] == []
        pruned = copy.deepcopy(model).eval()
        pruned.prune_intermediate_layers(indices, prune_norm=prune_norm)
        with torch.no_grad():
            assert torch.equal(pruned(x), pruned(x))


@small_model
def test_head_width_follows_pruning(name: str) -> None:
    model, x = create(name, num_classes=0).eval(), torch.randn(ODD)
    index = len(model.feature_info) - 2
    width = model.feature_info[index]["num_chs"]
    with torch.no_grad():
        assert model(x).shape == (2, model.head_hidden_size)
        model.prune_intermediate_layers([index], prune_norm=True)
        model.reset_classifier(7, "avg")
        assert model(x).shape == (2, 7)
        assert model.head_hidden_size == width
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, width)


@small_model
def test_init_weights_fills_storage_that_held_nothing(name: str) -> None:
    model = on_meta(name, num_classes=5).to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    model.init_weights()
    fresh = create(name, num_classes=5).state_dict()
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), key
        if tensor.numel() < 16:  # too few to tell how they are spread
            continue
        spreads = (fresh[key].float().std(correction=0), tensor.float().std(correction=0))
        torch.testing.assert_close(*spreads, rtol=0.5, atol=1e-2, msg=lambda text, key=key: f"{key}: {text}")
    assert model(torch.randn(ODD)).isfinite().all()


@small_model
def test_built_without_storage_and_loaded_it_is_the_same_model(name: str) -> None:
    model, x = spread(create(name)).eval(), torch.randn(ODD)
    empty = on_meta(name).to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(empty(x), model(x))


@small_model
def test_a_headless_checkpoint_loads_under_a_new_head(name: str, tmp_path: Path) -> None:
    source = spread(create(name, num_classes=0)).eval()
    overlay = weights_file(source, tmp_path / "headless.pth")
    model = create(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(ODD)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert model(x).shape == (2, 5)


@small_model
def test_a_checkpoint_takes_other_image_channels(name: str, tmp_path: Path) -> None:
    source = spread(create(name)).eval()
    overlay = weights_file(source, tmp_path / "colour.pth")
    model = create(name, pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    grey = torch.randn(2, 1, 48, 33)
    with torch.no_grad():
        torch.testing.assert_close(model(grey), source(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


@small_model
@pytest.mark.parametrize("options", [dict(num_classes=0), dict(num_classes=5, in_chans=1), dict(features_only=True)])
def test_a_published_checkpoint_loads_under_any_head(name: str, options: dict, tmp_path: Path) -> None:
    source = spread(create(name)).eval()
    torch.save({"model": family(name).to_published(source.state_dict()), "epoch": 3}, tmp_path / "published.pth")
    overlay = dict(file=str(tmp_path / "published.pth"))
    model = create(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    own = {key.removeprefix("model."): tensor for key, tensor in model.state_dict().items()}
    same = [key for key, tensor in source.state_dict().items() if key in own and torch.equal(own[key], tensor)]
    heads = [key for key in own if key.startswith("head.") and "norm" not in key]
    assert own.keys() - set(same) <= {*heads, f"{source.default_cfg['first_conv']}.weight"}
    assert len(same) > 0.9 * len(own)


@small_model
def test_a_published_tensor_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    model = create(name)
    state = family(name).to_published(model.state_dict())
    other = next(key for key in state if "A_log" in key)
    torch.save(state | {other: torch.zeros(3, 2)}, tmp_path / "other.pth")
    with pytest.raises((RuntimeError, ValueError), match=r"A_log.*\(?\[?3, 2"):
        create(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "other.pth")))


@small_model
def test_a_foreign_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    state = create(name).state_dict()
    lost = next(key for key in state if SPECIAL.search(key))
    state["stranger.weight"] = state.pop(lost)
    torch.save(state, tmp_path / "foreign.pth")
    with pytest.raises((RuntimeError, ValueError)) as refusal:
        create(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "foreign.pth")))
    assert lost in str(refusal.value) and "stranger.weight" in str(refusal.value)


@small_model
def test_set_input_size_and_reload_at_that_size(name: str, tmp_path: Path) -> None:
    model = spread(create(name, img_size=(64, 96))).eval()
    model.set_input_size((96, 48))
    assert get_model_input_config(model)["input_size"] == (3, 96, 48)
    overlay = weights_file(model, tmp_path / "wide.pth") | dict(input_size=(3, 96, 48))
    x = torch.randn(1, 3, 96, 48)
    same = create(name, img_size=(96, 48), pretrained=True, pretrained_cfg_overlay=overlay).eval()
    other = create(name, img_size=(48, 64), pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert torch.equal(same(x), model(x))
        # Resampled from the saved grid to another, and back by the image's size: no more than interpolation apart.
        torch.testing.assert_close(other(x), model(x), rtol=0.5, atol=0.5 * float(model(x).abs().max()))
        assert other(torch.randn(1, 3, 48, 64)).isfinite().all()


@small_model
def test_saved_for_the_hub_it_comes_back_the_same(name: str, tmp_path: Path) -> None:
    source = create(name, in_chans=4, num_classes=11, drop_rate=0.2, drop_path_rate=0.1)
    source.set_input_size((48, 64))
    source.reset_classifier(7)
    spread(source).eval()
    save_for_hf(source, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [key for key in saved.get("model_args", {}) if "drop" in key] == []
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert max((getattr(module, "drop_prob", 0.0) or 0.0 for module in restored.modules()), default=0.0) == 0
    assert get_model_input_config(restored)["input_size"] == (4, 48, 64)
    x = torch.randn(2, 4, 48, 64)
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), source(x))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=3)(torch.randn(ODD)).shape == (2, 7)


@small_model
@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate"])
def test_drop_rates_act_in_training_alone(name: str, rate: str) -> None:
    model, x = spread(create(name, **{rate: 0.5})), torch.randn(ODD)
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x))
        without = create(name).eval()
        without.load_state_dict(model.state_dict())  # training has moved the statistics of batch norms
        assert torch.equal(model.eval()(x), without(x))


@small_model
def test_an_unknown_argument_is_an_error(name: str) -> None:
    with pytest.raises(TypeError, match="state_size"):
        create(name, state_size=3)


@small_model
def test_the_class_token_if_any_leaves_the_model_first(name: str) -> None:
    if not ends_in_tokens(name):
        assert getattr(create(name), "num_prefix_tokens", 0) == 0
        return
    model, x = spread(create(name)).eval(), torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        features = model.forward_features(x)
        taps = model.forward_intermediates(x, indices=1, norm=True, return_prefix_tokens=True, intermediates_only=True)
    spatial, prefix = taps[0] if model.num_prefix_tokens else (taps[0], features[:, :0])
    torch.testing.assert_close(features[:, : model.num_prefix_tokens], prefix)
    torch.testing.assert_close(features[:, model.num_prefix_tokens :], spatial.flatten(2).transpose(1, 2))
