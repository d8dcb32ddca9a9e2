"""Detectors on our backbones: losses and gradients, detections, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from vision_mamba.detection.model import DETECTORS, Pyramid, create_detector

SMALL = dict(channels=64, head_channels=32, min_size=64, max_size=96)
HEADS = {  # what each detector learns
    "faster_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
    "mask_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"},
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
}


def data() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, 64, 80), torch.rand(3, 56, 64)]
    mask = torch.zeros(1, 64, 80, dtype=torch.uint8)
    mask[:, 10:40, 10:50] = 1
    with_one = {"boxes": torch.tensor([[10.0, 10, 50, 40]]), "labels": torch.tensor([2]), "masks": mask}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
             "masks": torch.zeros(0, 56, 64, dtype=torch.uint8)}  # fmt: skip
    return images, [with_one, empty]


@pytest.mark.parametrize(
    "detector, backbone", [*((name, "test_vmamba") for name in DETECTORS), ("mask_rcnn", "test_vim")]
)
def test_every_weight_gets_a_gradient_and_detections_lie_in_the_image(detector: str, backbone: str) -> None:
    model = create_detector(detector, backbone, classes=2, **SMALL)
    images, targets = data()
    losses = model(images, targets)
    assert set(losses) == HEADS[detector]
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert any(p.grad.abs().max() > 0 for p in model.backbone.body.parameters())
    with torch.no_grad():
        found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        assert set(one) == {"boxes", "labels", "scores"} | ({"masks"} if detector == "mask_rcnn" else set())
        height, width = image.shape[1:]
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([width, height] * 2)).all()
        if "masks" in one:
            assert one["masks"].shape[1:] == (1, height, width)


@pytest.mark.parametrize("detector", DETECTORS)
def test_boxes_are_no_coarser_under_autocast(detector: str) -> None:
    """Where the pixels that bfloat16 has are 4 apart."""
    every = {"box_score_thresh" if detector in ("faster_rcnn", "mask_rcnn") else "score_thresh": 0.0}
    torch.manual_seed(0)
    model = create_detector(detector, "test_vmamba", classes=2, detector_kwargs=every, **SMALL).eval()
    seen: list[torch.dtype] = []
    model.backbone.register_forward_hook(lambda module, args, levels: seen.extend(x.dtype for x in levels.values()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, 32, 800)])
    right = found["boxes"][:, 2]
    right = right[(right > 512) & (right < 800)]
    assert torch.bfloat16 in seen and len(right) and (right != right.bfloat16().float()).float().mean() > 0.5
    assert found["scores"].dtype == torch.float32


@pytest.mark.parametrize("backbone", ["test_vmamba", "test_localvmamba", "test_vim", "test_resnet"])
def test_levels_have_the_strides_asked_for(backbone: str) -> None:
    pyramid = Pyramid(backbone, (8, 16, 32), 16)
    levels = pyramid(torch.randn(1, 3, 64, 96))
    assert {name: tuple(level.shape[1:]) for name, level in levels.items()} == {
        "0": (16, 8, 12), "1": (16, 4, 6), "2": (16, 2, 3)
    }  # fmt: skip
    assert pyramid.plain == (backbone == "test_vim")


def test_taps_are_the_backbone_features_normed() -> None:
    pyramid = Pyramid("test_vmamba", (4, 8), 16)
    features = timm.create_model("test_vmamba", features_only=True, out_indices=(0, 1))
    features.load_state_dict(pyramid.body.state_dict())
    x, seen = torch.randn(1, 3, 32, 32), []
    pyramid.fpn.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0].values()))
    pyramid(x)
    for norm, tap, plain in zip(pyramid.norms, seen, features(x), strict=True):
        torch.testing.assert_close(tap, norm(plain))
        torch.testing.assert_close(tap.mean(1), torch.zeros_like(tap.mean(1)), atol=1e-5, rtol=0)


def test_what_the_backbone_exempts_is_exempt_under_its_longer_name() -> None:
    from timm.optim import param_groups_weight_decay

    for backbone, exempt in (("test_vmamba", ("A_logs", "Ds", "dt_projs_bias")), ("test_vim", ("A_log", "pos_embed"))):
        model: nn.Module = Pyramid(backbone, (8, 16), 16)
        groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        names = [name for name, _ in model.named_parameters() if name.endswith(exempt)]
        assert names and all(id(model.get_parameter(name)) in spared for name in names)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"test_vmamba has no map of stride 2; it has \(4, 8, 16, 32\)"):
        Pyramid("test_vmamba", (2, 4))
    for channels in (20, 32):
        with pytest.raises(ValueError, match=f"a multiple of 32 channels, 64 or more, got {channels}"):
            create_detector("fcos", "test_vmamba", classes=2, channels=channels)


@pytest.mark.parametrize("backbone, millions", [("vmamba_tiny_s1l8", 49.755), ("vmamba_tiny_s2l5", 50.212)])
def test_mask_rcnn_is_as_large_as_published(backbone: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_detector("mask_rcnn", backbone, classes=80)
    background = 4 * (1024 + 1) + (256 + 1)  # its box and mask, which mmdetection leaves out
    count = sum(parameter.numel() for parameter in model.parameters()) - background
    assert round(count / 1e6, 3) == millions
