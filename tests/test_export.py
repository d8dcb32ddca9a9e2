"""Files for other programs: each does what the model does or says why it cannot; nothing wrong is left behind."""

from __future__ import annotations

import doctest
import importlib.util
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vision_mamba.export
from tests.registered import SMALL
from tests.tolerances import LOGITS
from tools import export as tool
from vision_mamba.export import FORMATS, ExportError, Request, export_model, formats, refusal, write

small_model = pytest.mark.parametrize("name", SMALL)
# Less than the miniatures: one stage or block, to be quick.
TINY = {
    "test_vmamba": dict(dims=(16,), depths=(1,)),
    "test_vmamba_m2": dict(dims=(16,), depths=(1,)),
    "test_vim": dict(depth=1),
    "test_localvim": dict(depth=1, scan_order="local_2"),
}


def create(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).eval()


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package)


def check(kind: str, request: Request, path: Path) -> None:
    """Write, and compare with images that the exporter has not seen, of other numbers and sizes where they may vary."""
    needs(*FORMATS[kind].needs)
    done = export_model(kind, request, path)
    assert done.difference <= LOGITS and done.size == path.stat().st_size
    assert done.program.about == dict(request.about)
    program = FORMATS[kind].read(path)  # from the file as it stands
    size = (160, 96) if request.vary == "size" else request.size
    for batch in (1, 4) if request.vary != "none" else (2,):
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            (logits,), expected = program.run(images), request.model(images)
        assert (logits - expected).abs().max() <= LOGITS * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, name, scan",
    [
        ("pt2", "test_vim", None),
        ("torchscript", "test_vmamba", None),
        ("torchscript", "test_localvim", "plain"),
        ("onnx", "test_vmamba", None),
        ("onnx_script", "test_vim", None),
        ("onnx_script", "test_localvim", None),
        ("onnx_script", "test_vmamba_m2", None),
    ],
)
def test_a_file_does_what_the_model_does(kind: str, name: str, scan: str | None, tmp_path: Path) -> None:
    about = {"classes": ["cat", "hund ü"]}
    check(kind, Request(create(name, **TINY[name]), (64, 48), scan, about=about), tmp_path / "model")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_any_size_in_one_file(tmp_path: Path) -> None:
    check("pt2", Request(create("test_vmamba", **TINY["test_vmamba"]), (64, 48), vary="size"), tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@small_model
@pytest.mark.parametrize(
    "kind, scan, vary",
    [
        ("pt2", "operator", "size"),
        ("pt2", "plain", "batch"),
        ("torchscript", "operator", "size"),
        ("torchscript", "plain", "batch"),
        ("onnx", "plain", "batch"),
        ("onnx_script", "plain", "batch"),
        ("aoti", "plain", "batch"),
        ("aoti", "operator", "batch"),
    ],
)
def test_every_family_in_every_format(kind: str, scan: str, vary: str, name: str, tmp_path: Path) -> None:
    check(kind, Request(create(name), (64, 48), scan, vary), tmp_path / f"model{FORMATS[kind].suffix}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.platform != "linux", reason="ELF alone says what a stack must allow")
def test_a_package_runs_nothing_on_the_stack(tmp_path: Path) -> None:
    """Or glibc 2.41 and later refuse to load it, and hardened kernels end the process."""
    done = export_model("aoti", Request(create("test_vim", depth=1), (32, 32)), tmp_path / "model.pt2")
    with zipfile.ZipFile(done.path) as package:
        (library,) = [package.read(name) for name in package.namelist() if name.endswith(".so")]
    table, (size, count) = struct.unpack_from("<Q", library, 32)[0], struct.unpack_from("<HH", library, 54)
    headers = [struct.unpack_from("<II", library, table + size * i) for i in range(count)]
    (flags,) = [flags for kind, flags in headers if kind == 0x6474E551]  # PT_GNU_STACK
    assert not flags & 1


@pytest.mark.slow
@small_model
def test_inductor_compiles_every_family_whole(name: str) -> None:
    torch._dynamo.reset()
    model, x = create(name), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@small_model
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_every_family_takes_other_batches_and_sizes(backend: str, name: str) -> None:
    torch._dynamo.reset()
    model = create(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for shape in ((2, 3, 96, 128), (3, 3, 160, 64), (5, 3, 64, 96), (2, 3, 128, 128)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_maps_of_a_backbone_are_outputs_by_name(tmp_path: Path) -> None:
    needs("onnxruntime", "onnx")
    import onnxruntime

    backbone = create("test_vmamba", features_only=True, out_indices=(0,), dims=(8, 8), depths=(1, 1))
    done = export_model("onnx_script", Request(backbone, (32, 64)), tmp_path / "maps.onnx")
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["map_0"]
    assert done.program.run(torch.randn(3, 3, 32, 64))[0].shape == (3, 8, 8, 16)


def test_timm_builds_the_plain_scan_and_it_refuses_sizes_that_vary() -> None:
    model = create("test_vmamba", exportable=True, **TINY["test_vmamba"])
    varies = {2: 32 * torch.export.Dim("rows", min=2), 3: 32 * torch.export.Dim("columns", min=2)}
    with pytest.raises(ValueError, match=r"exportable=True: .* laid out for one grid of tokens"):
        torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(varies,))


@pytest.mark.parametrize(
    "kind, options, reason",
    [
        ("onnx", dict(scan="operator"), "it cannot call this library's operator"),
        (
            "onnx_script",
            dict(vary="size"),
            "the plain scan is laid out for one grid of tokens; .* pt2, aoti, torchscript",
        ),
        ("pt2", dict(scan="plain", vary="size"), "the plain scan is laid out for one grid"),
        ("torchscript", dict(int8=True), "it cannot hold torchao's int8 weights; take pt2"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_the_way_out(
    kind: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    needs(*FORMATS[kind].needs)
    with pytest.raises(ExportError, match=f"^{kind}: {reason}"):
        export_model(kind, Request(create("test_vim", depth=1), (64, 64), **options), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(size=64), r"size must be \(height, width\) in pixels, got 64"),
        (dict(size=(0, 64)), r"size must be \(height, width\)"),
        (dict(vary="both"), "vary must be one of 'none', 'batch', 'size', got 'both'"),
        (dict(scan="fast"), "scan must be one of None, 'operator', 'plain', got 'fast'"),
    ],
)
def test_a_request_that_means_nothing_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^Request: {reason}"):
        Request(create("test_vim", depth=1), **({"size": (64, 64)} | options))


def test_a_model_that_trains_or_is_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Request: the model is in training mode, .* call its eval\(\)"):
        Request(create("test_vim", depth=1).train(), (64, 64))
    with pytest.raises(ValueError, match=r"^Request: torch\.compile's wrapper"):
        Request(torch.compile(create("test_vim", depth=1)), (64, 64))  # type: ignore[arg-type]


@small_model
def test_no_size_decides_on_the_order_of_the_plain_scans_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As opt_einsum does where it is installed, which held exported models to the batch of their example."""

    def asked(*_: object) -> bool:
        raise AssertionError("a product of three tensors")

    monkeypatch.setattr(torch.backends.opt_einsum, "is_available", asked)
    with torch.no_grad():
        create(name, exportable=True)(torch.randn(1, 3, 32, 32))


def test_a_file_for_any_size_is_tried_at_the_size_asked_for() -> None:
    model = create("test_vim", depth=1)  # patches of 16 pixels, so the example is larger than this
    for size, fits in (((32, 48), True), ((32, 40), False)):
        tried = [tuple(images.shape[2:]) for images in Request(model, size, vary="size").others()]
        assert (size in tried) == fits and tried[:3] == [(48, 64), (48, 64), (64, 48)]


def test_a_model_of_one_size_is_refused_for_many() -> None:
    model = create("test_vim", depth=1, dynamic_img_size=False)
    assert "dynamic_img_size=True" in str(refusal("pt2", Request(model, (160, 160), vary="size")))


@pytest.mark.parametrize("absent, options", [("onnx", {}), ("torchao", dict(int8=True))])
def test_a_missing_package_is_named(absent: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name))
    kind = "pt2" if options else "onnx"
    reason = refusal(kind, Request(create("test_vim", depth=1), (64, 64), **options))
    assert reason and absent in reason and "pip install 'vision-mamba-timm[export]'" in reason


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no format is called 'onx'; did you mean 'onnx'"):
        export_model("onx", Request(create("test_vim", depth=1), (64, 64)), tmp_path / "model")


def test_a_name_that_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"aoti: the file's name must end in \.pt2, got model\.so"):
        export_model("aoti", Request(create("test_vim", depth=1), (64, 64)), tmp_path / "model.so")


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_differs_never_takes_the_place_of_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_text("the good one")
    monkeypatch.setattr(write, "PARITY", -1.0)
    with pytest.raises(ExportError, match=r"differs from the model by .* nothing was put at .*; export it in float32"):
        export_model("torchscript", Request(create("test_vim", depth=1).half(), (64, 64)), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"] and path.read_text() == "the good one"


@pytest.mark.parametrize(
    "ends, told", [("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"), ("raise IOError('no')", "no")]
)
def test_a_package_that_ends_who_loads_it_ends_another_process(
    ends: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(program: object, package_path: str, **_: object) -> None:
        Path(package_path).write_text("package")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    monkeypatch.setattr(Request, "exported", lambda request, plain: None)
    monkeypatch.setattr(formats, "_LOADING", f"import os, signal; {ends}")
    with pytest.raises(ExportError, match=rf"^aoti: .*that it cannot load here, .* ended with .*{told}; take another"):
        export_model("aoti", Request(create("test_vim", depth=1), (64, 64)), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written: "):
        export_model("torchscript", Request(create("test_vim", depth=1), (64, 64)), tmp_path / "file" / "model")
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(ExportError, match=r"model\.pt cannot be written: "):
        export_model("torchscript", Request(create("test_vim", depth=1), (64, 64)), tmp_path / "model.pt")


@pytest.mark.parametrize("result", [torch.tensor([float("nan"), 1.0]), torch.ones(3)])
def test_not_a_number_and_other_shapes_are_no_match(result: torch.Tensor) -> None:
    assert write.relative(result, torch.ones(2)) == float("inf")


@pytest.mark.filterwarnings("ignore")
def test_int8_weights_in_a_file(tmp_path: Path) -> None:
    needs("torchao")
    request = Request(create("test_vim", depth=1), (64, 64), int8=True)
    done = export_model("pt2", request, tmp_path / "model.pt2")
    with torch.no_grad():
        narrow, wide = done.program.run(request.example)[0], request.model(request.example)
    assert 0 < write.relative(narrow, wide) < 0.05
    assert all(p.dtype == torch.float32 for p in request.model.parameters())


# The tool.


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = tool.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.filterwarnings("ignore")
def test_the_tool_writes_what_it_can_and_tells_what_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "test_vim", "--num-classes", 5, "--img-size", 32, "--runs", 1, "--out", tmp_path / "new")
    status, out, err = run(capsys, *words, "--format", "torchscript", "onnx", "--scan", "operator")
    assert status == 1 and err.startswith("error: onnx: ")
    assert (tmp_path / "new" / "test_vim.torchscript.pt").exists()
    assert re.search(r"torchscript │ operator │ 0\.\d\d │ +\de[+-]\d\d │ +\d+\.\d │", out), out
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "say what to export"),
        (("--model", "vmamba_tiny_s1l9"), "did you mean 'vmamba_tiny_s1l8'"),
        (("--model", "vmamba_tiny_s1l8.in22k"), "Invalid pretrained tag (in22k) for vmamba_tiny_s1l8"),
        (("--model", "test_vim", "--features", "4"), "'out_indices': [4]}: feature index 4 is out of range"),
        (("--model", "test_vim", "--img-size", "1", "2", "3"), "--img-size takes a side, or height and width"),
        (("--checkpoint", "x.pth", "--pretrained"), "are for models without --checkpoint"),
    ],
)
def test_the_tool_explains_wrong_options(words: tuple, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *words)
    assert status == 2 and message in err


def test_the_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in FORMATS) and "exit status" in out


def test_examples_in_docstrings() -> None:
    done = doctest.testmod(vision_mamba.export)
    assert done.attempted and not done.failed
