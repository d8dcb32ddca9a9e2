"""Libraries that take timm models by name take ours: transformers, segmentation_models_pytorch, torch.hub.

They come with the extra `consumers`; without it these tests are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import Tensor, nn

from tests.models.test_registry import spread
from tests.registered import ALL, SMALL, ends_in_tokens
from tools import export
from vision_mamba.export import FORMATS
from vision_mamba.export.formats import SCANS

ROOT = Path(__file__).resolve().parents[1]
HIERARCHICAL = [name for name in SMALL if not ends_in_tokens(name)]

small_model = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here has a reason to ask the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def create(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return spread(timm.create_model(name, **options)).eval()


def saved(model: nn.Module, folder: Path) -> Path:
    """A folder as `push_to_hub` uploads it, in the form that transformers' Auto classes read.

    timm 1.0.31 writes the number of classes twice, which transformers 5 refuses.
    """
    save_for_hf(model, folder, safe_serialization=True)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["model_args"].pop("num_classes", None)
    file.write_text(json.dumps(config))
    return folder


def in_memory_of_its_own(model: nn.Module) -> nn.Module:
    """With weights that begin where an allocation does: on some processors products of others, as those of a file that
    is mapped into memory, differ in the last bit."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@small_model
def test_transformers_wraps_a_saved_model_and_saves_it_again(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source, x = create(name, num_classes=7), torch.randn(2, 3, 64, 48)
    wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(saved(source, tmp_path / "timm")).eval()
    wrapped.save_pretrained(tmp_path / "transformers")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "transformers").eval()
    with torch.no_grad():
        expected = source(x)
        # To the last bit: whatever is not in the file, such as a table, was made anew and not left as it was found.
        assert torch.equal(in_memory_of_its_own(wrapped)(x).logits, expected)
        assert torch.equal(in_memory_of_its_own(again)(x).logits, expected)


@small_model
def test_transformers_takes_a_backbone_from_a_saved_model(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source, x = create(name), torch.randn(2, 3, 64, 96)
    save_for_hf(source, tmp_path, safe_serialization=True)
    last = len(source.feature_info) - 1
    backbone = transformers.TimmBackbone.from_pretrained(f"local-dir:{tmp_path}", out_indices=[last - 1, last]).eval()
    with torch.no_grad():
        maps = backbone(x).feature_maps
        expected = source.forward_intermediates(x, indices=[last - 1, last], intermediates_only=True)
    assert all(map(torch.equal, maps, expected))
    assert backbone.channels == [info["num_chs"] for info in source.feature_info[-2:]]


@small_model
def test_transformers_takes_a_backbone_by_name(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[-2, -1])
    backbone = transformers.AutoBackbone.from_config(config).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [tap.shape[1:] for tap in maps] == [
        (info["num_chs"], 64 // info["reduction"], 96 // info["reduction"]) for info in create(name).feature_info[-2:]
    ]


def backward(model: nn.Module) -> Tensor:
    mask = model.train()(torch.randn(2, 3, 96, 64))
    mask.square().mean().backward()
    return mask


@pytest.mark.parametrize(
    "head, name",
    [*(("UPerNet", name) for name in HIERARCHICAL), *((head, "test_vmamba") for head in ("Unet", "FPN", "Segformer"))],
)
def test_a_segmenter_trains_on_a_pyramid(head: str, name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, head)(f"tu-{name}", encoder_weights=None, classes=5)
    assert backward(model).shape == (2, 5, 96, 64)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_dpt_trains_on_plain_models_and_pyramids(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.DPT(f"tu-{name}", encoder_weights=None, classes=5)
    assert backward(model).shape == (2, 5, 96, 64)
    idle = {n for n, p in model.named_parameters() if p.grad is None}
    assert {n.split(".")[2] for n in idle} <= {"norm", "head"}  # it keeps the classifier and does not use it


@pytest.mark.parametrize("name", [name for name in SMALL if ends_in_tokens(name)])
def test_heads_that_want_a_pyramid_refuse_a_plain_model(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(ValueError, match="downsampling"):
        smp.Unet(f"tu-{name}", encoder_weights=None)


@pytest.mark.filterwarnings("ignore")
def test_torch_hub_has_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import hubconf

    assert {name for name in vars(hubconf) if not name.startswith("_")} == {"dependencies", *ALL}
    model = torch.hub.load(str(ROOT), "test_vim", source="local", num_classes=4)
    assert model.num_classes == 4 and type(model).__module__.startswith("vision_mamba.")
    assert "7.1 M parameters" in hubconf.vim_tiny_patch16_224.__doc__


def test_torch_hub_names_an_argument_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="state_size"):
        torch.hub.load(str(ROOT), "test_vim", source="local", state_size=3)


# docs/deployment.md: its blocks of Python run in order, those of a section only where its packages are.

PAGE = (ROOT / "docs" / "deployment.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_deployment_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime", "transformers", "segmentation_models_pytorch"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 11
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "deployment.md", "exec"), names)
    torch._dynamo.reset()


def test_the_page_names_what_there_is() -> None:
    named = [*re.findall(r"\b(?:docs|tools|configs|results)/[\w./]*\w", PAGE), "docs/model_card.md"]
    assert [path for path in named if not (ROOT / path).exists()] == []
    rows = re.findall(r"^\| .*\(`(\w+)`\)", PAGE, re.MULTILINE)
    assert rows == list(FORMATS)
    options = set(re.findall(r"(--[a-z][a-z0-9-]+)", PAGE))
    assert options <= set(re.findall(r"(--[a-z][a-z0-9-]+)", export.parser().format_help()))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_page_says_which_scans_a_format_holds(kind: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if f"(`{kind}`)" in line]
    operator, plain, _, sizes = [cell.strip() for cell in row.split("|")[2:6]]
    assert [operator.startswith("yes"), plain.startswith("yes")] == [scan in FORMATS[kind].scans for scan in SCANS]
    assert (sizes != "no") == ("operator" in FORMATS[kind].scans)
