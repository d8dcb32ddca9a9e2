"""What models see, in numbers: implicit attention is the scan, the other maps are what their equations say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vision_mamba
from vision_mamba.viz import (
    animate_orders,
    effective_receptive_field,
    feature_pca,
    grad_cam,
    implicit_attention,
    route_maps,
    route_outputs,
    scans_of,
)

assert vision_mamba
# Grids that are not square, and windows that hang over their edges.
MODELS = [("test_vmamba", {}), ("test_vmamba", {"d_state": 4, "scan_order": "local_2"}), ("test_localvmamba", {}),
          ("test_vim", {}), ("test_vim", {"class_token": "double"}), ("test_localvim", {}), ("test_plainmamba", {}),
          ("test_efficientvmamba", {}), ("test_videomamba", {}), ("test_mambavision", {})]  # fmt: skip


def scanned(name: str, kwargs: dict, size: tuple[int, int] = (48, 80)) -> list:
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    return scans_of(model, torch.randn(2, 3, *size))


@pytest.mark.parametrize("name, kwargs", MODELS, ids=str)
def test_the_implicit_attention_of_a_scan_times_its_input_is_its_output(name: str, kwargs: dict) -> None:
    for scan in scanned(name, kwargs, (28, 48) if "vmamba" in name else (48, 80))[:2]:
        matrices = implicit_attention(scan, "none", skip=True)
        x, y = scan.call.x.double(), route_outputs(scan).double()
        if scan.laid_out:  # LocalVim's scans have an input of each route's own, in its order
            x = x if x.dim() == 4 else x.unsqueeze(2)
            laid_back = x.new_zeros(x.shape[0], scan.tokens, *x.shape[2:])
            for k, route in enumerate(scan.table):
                laid_back[:, route[route >= 0], k] = x[:, route >= 0, k]
            # Padding steps have an input there, so tokens are not all that goes in unless those come last.
            whole = [k for k, route in enumerate(scan.table) if (route[: scan.tokens] >= 0).all()]
            assert whole
            matrices, x, y = matrices[:, whole], laid_back[:, :, whole], y[:, :, whole]
        product = torch.einsum("bkdts,bskd->btkd" if x.dim() == 4 else "bkdts,bsd->btkd", matrices, x)
        assert torch.linalg.norm(product - y) < 1e-5 * torch.linalg.norm(y), scan.layer


def test_reductions_are_over_channels_and_nothing_reads_what_comes_later() -> None:
    scan = scanned("test_vmamba", {}, (28, 48))[0]
    every = implicit_attention(scan, "none")
    torch.testing.assert_close(implicit_attention(scan, "mean"), every.mean(2))
    torch.testing.assert_close(implicit_attention(scan, "abs"), every.abs().mean(2))
    for k, route in enumerate(scan.table):
        assert (every[:, k, :, route[:, None], route].triu(1) == 0).all()
        assert (every[:, k, :, route[:, None], route].diagonal(dim1=-2, dim2=-1) != 0).any()
    with pytest.raises(ValueError, match="reduction must be 'abs', 'mean' or 'none', got 'max'"):
        implicit_attention(scan, "max")


def test_scans_are_told_by_their_layer_and_grid() -> None:
    found = scanned("test_vmamba", {})
    assert [scan.layer for scan in found[:2]] == ["stages.0.blocks.0.ss2d", "stages.1.blocks.0.ss2d"]
    assert [scan.grid for scan in found] == [(12, 20), (6, 10), (3, 5), (3, 5), (2, 3)]
    found = scanned("test_vim", {})
    assert len(found) == 4 and found[0].grid == (3, 5) and found[0].tokens == 16
    assert found[0].patches.tolist() == [i for i in range(16) if i != 7]
    found = scanned("test_mambavision", {})
    assert [(scan.call.batch, scan.grid, scan.tokens) for scan in found] == [(4, (3, 3), 9)] * 2 + [(4, (2, 2), 4)]
    with pytest.raises(ValueError, match="no layer of ResNet is a selective scan"):
        scans_of(timm.create_model("test_resnet").eval(), torch.randn(1, 3, 32, 32))


def test_routes_add_up_to_what_the_layer_got(one_thread) -> None:
    for scan in scanned("test_vmamba", {}):
        (y, _) = torch.ops.vision_mamba.cross_selective_scan(*scan.call._replace(merge=True))
        torch.testing.assert_close(route_outputs(scan).sum(2), y.to(scan.call.x.dtype), rtol=1e-4, atol=1e-5)
        maps = route_maps(scan)
        assert maps.shape == (2, 4, *scan.grid)
        assert scan.call.D is not None
        states = route_outputs(scan)[1, :, 2] - scan.call.D[2] * scan.call.x[1]
        norms = states.norm(dim=-1)
        torch.testing.assert_close(maps[1, 2].flatten(), norms, rtol=1e-3, atol=1e-5)


def test_the_field_of_known_convolutions() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    nn.init.ones_(conv.weight)
    twice = nn.Sequential(conv, nn.Conv2d(2, 1, 3, padding=1, bias=False))
    nn.init.ones_(twice[1].weight)
    field = effective_receptive_field(twice, torch.randn(2, 1, 11, 13))
    line = torch.tensor([1.0, 2, 3, 2, 1])
    expected = torch.zeros(11, 13)
    expected[3:8, 4:9] = line[:, None] * line / 9
    torch.testing.assert_close(field, expected)


def test_a_scan_model_sees_the_whole_image_and_leaves_the_images_alone() -> None:
    model = timm.create_model("test_vmamba", features_only=True, out_indices=(0,)).eval()
    images = torch.randn(1, 3, 32, 32)
    field = effective_receptive_field(lambda x: model(x)[0], images)
    assert field.shape == (32, 32) and field.max() == 1 and (field > 0).all() and not images.requires_grad


def test_grad_cam_of_a_linear_classifier_is_its_class_map() -> None:
    """Behind a mean over the map and one linear layer, the gradient is the class's weights over the patches."""
    model = timm.create_model("test_vmamba", num_classes=5).eval()
    model.norm = nn.Identity()
    x = torch.randn(2, 3, 64, 96)
    maps = model.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    expected = torch.einsum("bchw,c->bhw", maps, model.head.fc.weight[2]).relu()
    expected = expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(grad_cam(model, x, target=2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where, place", [("middle", 7), ("head", 0)])
def test_grad_cam_leaves_the_class_token_out_wherever_it_stands(where: str, place: int) -> None:
    model = timm.create_model("test_vim", num_classes=5, class_token=where).eval()
    images = torch.randn(1, 3, 48, 80)  # 3 x 5 patches
    tokens = model._embed(images)[0]
    for block in model.blocks[:-1]:
        tokens = block(tokens, 3, 5)
    tokens = tokens.detach().requires_grad_()
    logit = model.head(model.norm(model.blocks[-1](tokens, 3, 5))[0, place])[4]
    (gradient,) = torch.autograd.grad(logit, tokens)
    patches = [i for i in range(16) if i != place]
    cam = F.relu(tokens[0, patches] @ gradient[0, patches].mean(0)).reshape(3, 5).detach()
    torch.testing.assert_close(grad_cam(model, images, target=4)[0], cam / cam.max(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"do not depend on the patches that come out of blocks\.3"):
        grad_cam(model, images, index=3)


def test_grad_cam_takes_the_likeliest_class_and_other_models() -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    best = model(images).argmax(1).tolist()
    each = torch.stack([grad_cam(model, images[i : i + 1], target=best[i])[0] for i in range(2)])
    torch.testing.assert_close(grad_cam(model, images), each)


@pytest.mark.parametrize("wrong", [dict(target=5), dict(target=-1), dict(index=4), dict(index=-5)], ids=str)
def test_grad_cam_of_what_does_not_exist_is_an_error(wrong: dict[str, int]) -> None:
    model = timm.create_model("test_vmamba", num_classes=5).eval()
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"grad_cam: {name} must be .* got {wrong[name]}"):
        grad_cam(model, torch.randn(1, 3, 32, 32), **wrong)


def known_features() -> tuple[Tensor, Tensor]:
    """Three signals of falling strength along three directions that are orthogonal, and these signals."""
    signals = torch.randn(3, 2 * 6 * 7, dtype=torch.float64)
    signals = torch.linalg.qr((signals - signals.mean(1, keepdim=True)).T)[0].T
    axes = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T
    points = (signals * torch.tensor([[30.0], [20.0], [10.0]])).T @ axes + 5.0
    return points.reshape(2, 6, 7, 8).permute(0, 3, 1, 2), signals


def test_components_are_the_directions_of_most_variance() -> None:
    features, signals = known_features()
    found = feature_pca(features)
    assert found.shape == (2, 6, 7, 3) and found.min() == 0 and found.max() == 1
    for component, signal in zip(found.reshape(-1, 3).T, signals, strict=True):
        correlation = torch.corrcoef(torch.stack((component, signal)))[0, 1]
        assert correlation.abs() > 0.98  # ends are cut
    torch.testing.assert_close(feature_pca(features * 3 - 1), found)


def test_routes_grow_in_an_animation(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    animate_orders(["bidirectional"], photo, tmp_path / "o.gif", grid=(3, 3), frames=4, seconds=0.4)
    with Image.open(tmp_path / "o.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (4, 0)
        pictures, durations = [], []
        for number in range(4):
            gif.seek(number)
            pictures.append(np.asarray(gif.convert("RGB"), np.int16))
            durations.append(gif.info["duration"])
    assert durations == [100, 100, 100, 230]
    changed = [int((np.abs(picture - pictures[0]).max(2) > 8).sum()) for picture in pictures]
    assert changed == sorted(set(changed))  # every frame adds to the one before
