"""VMamba: the published code's results on weights made by rule, its checkpoints in all their spellings, its sizes."""

from __future__ import annotations

import json
import logging
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from tests.tolerances import LOGITS
from vision_mamba.models import pyramid, vmamba
from vision_mamba.models.vmamba import VMamba, checkpoint_filter_fn, to_published

# Parameters, and giga multiply-adds at 224 px as published, which count the scan's 9 N operations a step as many, and
# those of the layer norms.
PUBLISHED = {
    "vmamba_tiny_s1l8": (30_249_064, 4.906),
    "vmamba_tiny_s2l5": (30_705_832, 4.858),
    "vmamba_small_s2l15": (50_147_752, 8.716),
    "vmamba_small_s1l20": (49_012_840, 8.612),
    "vmamba_base_s2l15": (88_557_800, 15.359),
    "vmamba_base_s1l20": (86_614_504, 15.221),
    "vmamba_tiny_v0": (22_893_448, 5.627),
    "vmamba_small_v0": (44_417_416, 11.232),
    "vmamba_base_v0": (76_254_056, 18.020),
}
#: Those on Mamba-2's scan, of which neither weights nor operations were published.
PUBLISHED_M2 = {"vmamba_tiny_m2": 25_340_296, "vmamba_small_m2": 39_079_816, "vmamba_base_m2": 67_527_528}
PARAMETERS = {name: counted[0] for name, counted in PUBLISHED.items()} | PUBLISHED_M2

# What the published code gives: made once by running it on the CPU in float32, sequential scan.
# The large ones are for tools/parity.py, which runs them all and leaves a record.
CASES = json.loads((Path(__file__).parent / "fixtures" / "vmamba.json").read_text())
CASES = [case for case in CASES if case.get("parameters", 0) < 3e7]

V0 = dict(d_state=4, gate=True, ssm_conv_bias=True, stem="patch", downsample="merge", mlp_ratio=0.0)

M2 = dict(ssd=True, d_state=4, ssm_act_layer="gelu")


def small(**arguments: Any) -> VMamba:
    return timm.create_model("test_vmamba", num_classes=5, **arguments).eval()


def spread(tensor: Tensor, count: int) -> Tensor:
    """The values that the fixture keeps of a tensor: `count` of them, evenly spaced."""
    return tensor.detach().flatten()[torch.linspace(0, tensor.numel() - 1, min(count, tensor.numel())).long()]


def assert_same(name: str, result: Tensor, expected: list[float]) -> None:
    scale = max(map(abs, expected))
    error = float((result - torch.tensor(expected)).abs().max())
    assert error <= LOGITS * scale, f"{name}: off by {error:.1e} at a scale of {scale:.1e}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmamba_tiny_s2l5", "vmamba_base_s2l15"])
def test_operations_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model, x = timm.create_model(name).eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    scans = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "cross_selective_scan" in str(op))
    # A step of a channel: 9 N + 1 operations and R multiply-adds, over four routes.
    steps = [4 * depth * (56 >> i) ** 2 for i, depth in enumerate(len(stage.blocks) for stage in model.stages)]
    mixers = [stage.blocks[0].ss2d for stage in model.stages]
    assert scans == sum(n * mixer.d_inner * (10 + 2 * mixer.dt_rank) for n, mixer in zip(steps, mixers, strict=True))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[name][1], rel=0.02)


@pytest.mark.parametrize("name", ["test_vmamba", "test_vmamba_m2"])
def test_small_model_is_small(name: str) -> None:
    assert sum(parameter.numel() for parameter in timm.create_model(name).parameters()) < 200_000


def describe(case: dict[str, Any]) -> str:
    words = [case["model"], *map(str, case["arguments"].values()), "x".join(map(str, case["input"]))]
    return "-".join(words + ["scaled"] * bool(case["scaled"]))


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_published_results(case: dict[str, Any]) -> None:
    with torch.device("meta"):  # all its weights come from the state dict
        model = timm.create_model(case["model"], **case["arguments"]).eval()
    state = golden.fill_state_dict(to_published(model.state_dict()))
    for name, factor in case["scaled"].items():  # small activations, on which the norms' epsilon shows
        state[name] *= factor
    assert golden.fingerprint(state) == case["weights"]
    model.load_state_dict(checkpoint_filter_fn(state, model), assign=True)

    gradients = case.get("gradients", {})
    x = golden.image(*case["input"]).requires_grad_(bool(gradients))
    with torch.set_grad_enabled(bool(gradients)):
        logits = model(x)
    assert_same("logits", spread(logits, 32), case["logits"])
    assert logits.argmax(1).tolist() == case["argmax"]
    assert float(logits.detach().std()) == pytest.approx(case["std"], rel=1e-5)
    assert float(logits.detach().sum()) == pytest.approx(case["sum"], abs=1e-2)
    if gradients:
        parameters = to_published(dict(model.named_parameters()))
        wanted = [x if name == "input" else parameters[name] for name in gradients]
        found = torch.autograd.grad((logits * golden.image(*logits.shape)).sum(), wanted)
        for (name, expected), gradient in zip(gradients.items(), found, strict=True):
            assert_same(f"gradient of {name}", spread(gradient, 8), expected["values"])
            assert float(gradient.norm()) == pytest.approx(expected["norm"], rel=1e-4), name


def replaced(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for old, new in pairs:
            state = {
                new + n.removeprefix(old) if n.startswith(old) else n.replace(old, new): t for n, t in state.items()
            }
        return state

    return rename


january_2024 = replaced(
    (".norm.", ".ln_1."),
    (".op.", ".self_attention."),
    (".downsample.ln_1.", ".downsample.norm."),
    ("classifier.ln_1.", "norm."),
    ("classifier.head.", "head."),
    ("patch_embed.0.", "patch_embed.proj."),
    ("patch_embed.2.", "patch_embed.norm."),
)


def single_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the edition in one file, whose projections are linear layers over all routes."""
    if "layers.0.downsample.reduction.weight" in state:
        state = replaced((".downsample.norm.", ".downsample.1."), (".downsample.reduction.", ".downsample.2."))(state)
    stacked = [name for name in state if name.endswith(("x_proj_weight", "dt_projs_weight"))]
    linear = {name.replace("_weight", ".weight"): state[name].flatten(0, 1) for name in stacked}
    return {name: tensor for name, tensor in state.items() if name not in stacked} | linear


def convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t[:, :, None, None] if ".mlp." in n and t.dim() == 2 else t for n, t in state.items()}


SPELLINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "bare": lambda state: state,
    "training file": lambda state: {"model": state, "model_ema": {}, "optimizer": {}, "epoch": 3},
    "averaged alone": lambda state: {"model_ema": state, "epoch": 3},
    "wrapped": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "January 2024": january_2024,
    "single file": single_file,
    "convolutions": convolutions,
}


@pytest.mark.parametrize("arguments", [{}, V0, M2], ids=["today", "first version", "Mamba-2"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_published_spelling_loads(spelling: str, arguments: dict[str, Any]) -> None:
    source, target = small(**arguments), small(**arguments)
    checkpoint = SPELLINGS[spelling](to_published(source.state_dict()))
    target.load_state_dict(checkpoint_filter_fn(checkpoint, target))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_own_checkpoints_pass_through() -> None:
    model = small()
    state = model.state_dict()
    assert list(checkpoint_filter_fn(state, model)) == list(state)
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    assert list(checkpoint_filter_fn(headless, model)) == list(headless)


def test_backbone_of_a_detector_loads(caplog: pytest.LogCaptureFixture) -> None:
    source, target = small(), small()
    state = {f"backbone.{n}": t for n, t in to_published(source.state_dict()).items() if "classifier" not in n}
    for i, info in enumerate(source.feature_info):
        state[f"backbone.outnorm{i}.weight"] = torch.full((info["num_chs"],), float(i))
        state[f"backbone.outnorm{i}.bias"] = torch.zeros(info["num_chs"])
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    with caplog.at_level(logging.WARNING, "vision_mamba"):
        target.load_state_dict(checkpoint_filter_fn({"state_dict": state}, target), strict=False)
    assert "outnorm0.weight" in caplog.text and "outnorm3" not in caplog.text
    x = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        assert torch.equal(source.stages(source.stem(x)), target.stages(target.stem(x)))
    assert torch.equal(target.norm.weight, torch.full((64,), 3.0))


@pytest.mark.parametrize("classes", [5, 7])
def test_what_is_missing_or_unused_is_named(tmp_path: Path, classes: int) -> None:
    state = to_published(small().state_dict())
    del state["layers.1.blocks.0.op.Ds"]
    state["pos_embed"] = torch.zeros(1, 16, 56, 56)
    torch.save({"model": state}, tmp_path / "other.pth")
    card = dict(file=str(tmp_path / "other.pth"), num_classes=5)
    with pytest.raises(
        ValueError, match=r"1 \(stages\.1\.blocks\.0\.ss2d\.Ds\) missing, 1 \(pos_embed\) not used\. Create"
    ):
        timm.create_model("test_vmamba", pretrained=True, pretrained_cfg_overlay=card, num_classes=classes)


def test_a_foreign_checkpoint_is_told_of_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"nothing was loaded") as caught:
        checkpoint_filter_fn({"state_dict": {"conv1.weight": torch.zeros(1)}}, small())
    first = r"stem\.conv1\.weight, (\S+, ){4}\.\.\. and \d+ more"
    assert re.search(rf"\d+ \({first}\) missing, 1 \(conv1\.weight\) not used\.", str(caught.value))


def test_a_tensor_of_another_shape_is_refused() -> None:
    model = small(ssm_ratio=2.0)
    state = to_published(model.state_dict())
    state["layers.0.blocks.0.op.in_proj.weight"] = state["layers.0.blocks.0.op.in_proj.weight"].T.contiguous()
    with pytest.raises(RuntimeError, match=r"size mismatch for stages\.0\.blocks\.0\.ss2d\.in_proj\.weight"):
        model.load_state_dict(checkpoint_filter_fn(state, model))


def test_training_files_load_without_the_library_of_their_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    settings = module.CfgNode(MODEL=module.CfgNode(NAME="vssm"))
    settings.__dict__["__immutable__"] = True
    source = small()
    with monkeypatch.context() as there:
        there.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        there.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": to_published(source.state_dict()), "config": settings}, tmp_path / "published.pth")
    card = dict(file=str(tmp_path / "published.pth"), num_classes=5)
    loaded = timm.create_model("test_vmamba", pretrained=True, pretrained_cfg_overlay=card, num_classes=5)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("vssm1_tiny_0230s", "tiny_s1l8"),
        ("vssm_tiny_0230", "tiny_s2l5"),
        ("vanilla_vmamba_tiny", "tiny_v0"),
        ("vmamba_base", "base_s2l15"),
    ],
)
def test_published_names_stand_for_ours(name: str, ours: str) -> None:
    assert name not in timm.list_models("*vmamba*")
    with torch.device("meta"), pytest.warns(UserWarning, match=f"{name} to current vmamba_{ours}"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[f"vmamba_{ours}"][0]


def test_released_weights_have_an_address() -> None:
    for name in PUBLISHED:
        card = timm.get_pretrained_cfg(name)
        assert card.url.startswith("https://github.com/MzeroMiko/VMamba/releases/") and card.tag == "in1k"
        assert card.input_size == (3, 224, 224) and card.crop_pct == 0.875 and card.license == "mit"


def test_initialisation_is_the_published_one() -> None:
    model = timm.create_model("test_vmamba", d_state=4, dims=(64, 64, 64, 64))
    model.init_weights()  # once more, as after storage was made anew
    mixer = model.stages[2].blocks[1].ss2d
    assert torch.equal(mixer.A_logs, torch.arange(1.0, 5.0).log().expand(4 * 64, 4))
    assert torch.equal(mixer.Ds, torch.ones(4 * 64))
    dt = F.softplus(mixer.dt_projs_bias)
    assert 1e-3 * 0.999 < dt.min() < 2e-3 and 5e-2 < dt.max() < 0.1001
    for weight, bound in ((mixer.x_proj_weight, 64**-0.5), (mixer.dt_projs_weight, 4**-0.5)):
        assert bound * 0.95 < weight.abs().max() <= bound
    assert float(mixer.in_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.stages[1].downsample.conv.weight.detach().abs().max()) == pytest.approx(
        (9 * 64) ** -0.5, rel=0.05
    )
    assert not model.head.fc.bias.any()


def test_initialisation_on_mamba_2s_scan_is_the_published_one() -> None:
    model = timm.create_model("test_vmamba_m2", dims=(64, 64, 64, 64))
    model.init_weights()
    mixer = model.stages[2].blocks[1].ss2d
    assert not mixer.A_logs.any() and torch.equal(mixer.Ds, torch.ones(4, 4, 16))
    assert 0 <= mixer.dt_projs_bias.min() < 0.03 and 0.07 < mixer.dt_projs_bias.max() <= 0.1
    assert 64**-0.5 * 0.95 < mixer.x_proj_weight.abs().max() <= 64**-0.5


@pytest.mark.parametrize("arguments", [{}, M2, V0 | dict(route_attention=True)], ids=["today", "Mamba-2", "attention"])
def test_mean_of_the_routes_is_a_quarter_of_their_sum(arguments: dict[str, Any]) -> None:
    """Seen before the norm, which takes the factor out again."""
    seen: list[Tensor] = []
    for average in (False, True):
        torch.manual_seed(0)
        model = small(average_routes=average, **arguments)
        model.stages[0].blocks[0].ss2d.out_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model(torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48))
    torch.testing.assert_close(seen[1], seen[0] / 4)


@pytest.mark.parametrize("arguments", [{}, M2], ids=["today", "Mamba-2"])
def test_normed_columns_keep_large_activations_from_the_scan(arguments: dict[str, Any]) -> None:
    for norm_columns in (False, True):
        mixer = small(norm_columns=norm_columns, **arguments).stages[0].blocks[0].ss2d
        mixer.in_proj.weight.data *= 1e4
        columns: list[Tensor] = []
        scan = mixer.scan.forward
        mixer.scan.forward = lambda *inputs, scan=scan, columns=columns, **options: (  # type: ignore[method-assign]
            columns.extend(inputs[i] for i in (1, 3, 4)) or scan(*inputs, **options)
        )
        with torch.no_grad():
            mixer(torch.randn(1, 5, 7, 16))
        square = sum(c.square().sum((-1, -2) if c.dim() == 5 else -1) for c in columns) / (
            mixer.dt_rank + 2 * mixer.d_state
        )
        assert torch.allclose(square, torch.ones(()), atol=1e-3) is norm_columns
        assert (float(square.max()) > 100) is not norm_columns


def test_every_tensor_between_blocks_is_contiguous_channels_last() -> None:
    model = small()
    x = model.stem(torch.randn(2, 3, 64, 96))
    for stage in model.stages:
        for layer in (stage.downsample, *stage.blocks):
            assert x.is_contiguous() and x.shape[0] == 2
            x = layer(x)


def test_stages_hand_on_what_is_still_to_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images = timm.create_model("test_vmamba", num_classes=3).eval(), torch.randn(1, 3, 64, 32)
    expected = model(images)
    sums: list[torch.Size] = []
    given = pyramid.product_sum
    monkeypatch.setattr(pyramid, "eager_on_gpu", lambda x: True)
    monkeypatch.setattr(vmamba, "chains_on_gpu", lambda x: True)
    monkeypatch.setattr(pyramid, "product_sum", lambda x, branch: sums.append(x.shape) or given(x, branch))
    torch.testing.assert_close(model(images), expected)
    assert [shape[1:3] for shape in sums] == [(16, 8), (8, 4), (4, 2)]
    sums.clear()
    model.stages[0].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(images), expected)
    assert [shape[1:3] for shape in sums] == [(8, 4), (4, 2)], "a hook waits for the first stage's own result"


def test_sums_of_routes_cannot_overflow_in_half_precision() -> None:
    model, kinds = small(), []
    mixer = model.stages[0].blocks[0].ss2d
    mixer.out_norm.register_forward_pre_hook(lambda _, inputs: kinds.append(inputs[0].dtype))
    with torch.no_grad():
        model(x := torch.randn(1, 3, 32, 32))
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        with torch.autocast("cpu", torch.float16):
            model(x)
        model.bfloat16()(x.bfloat16())
    assert kinds == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]


def test_the_scan_order_is_an_argument() -> None:
    cross, snake = small(), small(scan_order="snake")
    snake.load_state_dict(cross.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(cross(x), snake(x))
    assert small(scan_order="bidirectional").stages[0].blocks[0].ss2d.A_logs.shape[0] == 2 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stem="conv"), "VMamba: stem must be one of patch, overlap; got 'conv'"),
        (dict(downsample="pool"), "VMamba: downsample must be one of merge, patch, overlap; got 'pool'"),
        (dict(scan_order="cros"), "did you mean 'cross'"),
        (dict(depths=(1, 2)), "dims and depths must name as many stages, got 4 and 2"),
        (dict(patch_size=3), "patch_size must be even, got 3; take stem='patch'"),
        (dict(d_conv=2), "SS2D: d_conv must be odd, got 2"),
        (M2 | dict(d_conv=4), "SSD2D: d_conv must be odd, got 4"),
        (M2 | dict(dt_rank=3), "SSD2D: the heads must divide the 16 inner channels, got 3; choose another dt_rank"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("stem", ["overlap", "patch"])
def test_features_shrink_as_they_say(patch_size: int, stem: str) -> None:
    model = small(patch_size=patch_size, stem=stem, features_only=True)
    for tap, info in zip(model(torch.zeros(1, 3, 64, 128)), model.feature_info, strict=True):
        assert tap.shape == (1, info["num_chs"], 64 // info["reduction"], 128 // info["reduction"])
