"""The formats: what each can hold, how it is written, and how it is read back to be run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.onnx.symbolic_helper import parse_args

from vision_mamba.export.prepare import as_plain, coarsest, for_one_size, int8_weights, takes_any_size

#: Where a file says what it is of: the name of an entry or property with JSON, in every format.
ABOUT = "about.json"

SCANS = ("operator", "plain")
VARIES = ("none", "batch", "size")

_OPSET = 18  # of ONNX, for the exporter of TorchScript
_LOADING = "import sys, torch, vision_mamba; torch._inductor.aoti_load_package(sys.argv[1])"
# By default AOTInductor puts weights into a library by an assembler file that does not say that it runs nothing on the
# stack, so the library asks for a stack that can be run, and glibc 2.41 refuses to load it. Behind the library's end,
# with its head from C++, weights ask for nothing.
_NO_CODE_ON_THE_STACK = {"aot_inductor.force_mmap_weights": True, "aot_inductor.use_consts_asm_build": False}


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Args:
        model: in eval mode; it stays as it is.
        size: height and width of the images.
        scan: "operator" keeps the library's operator, which must be imported where the file runs; "plain" spells the
            scan out in tensor operations, and the file needs nothing of this library. By default what suits the format.
        vary: what may differ from call to call: "batch", "size" (that and height and width), or "none".
        int8: hold the weights of the linear layers in int8.
        about: put into the file, as JSON.

    Raises: ValueError for a model in training mode or in torch.compile's wrapper, and for options that do not exist.
    """

    model: nn.Module
    size: tuple[int, int]
    scan: str | None = None
    vary: str = "batch"
    int8: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model.training:
            raise ValueError("Request: the model is in training mode, drops and batch statistics on; call its eval().")
        if hasattr(self.model, "_orig_mod"):
            raise ValueError("Request: torch.compile's wrapper cannot be exported; give the model that it was made of.")
        if not isinstance(self.size, Sequence) or len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"Request: size must be (height, width) in pixels, got {self.size!r}.")
        for name, value, known in (("scan", self.scan, (None, *SCANS)), ("vary", self.vary, VARIES)):
            if value not in known:
                raise ValueError(f"Request: {name} must be one of {', '.join(map(repr, known))}, got {value!r}.")

    @cached_property
    def example(self) -> Tensor:
        """Images to trace with: two of them, of sides that nothing else in the model has, where sides may vary."""
        height, width = self.size
        if self.vary == "size":
            step = coarsest(self.model)
            height, width = max(3 * step, -(-height // step) * step), max(4 * step, -(-width // step) * step)
            width += step if width == height else 0
        return self.images(2, height, width)

    def images(self, batch: int, height: int, width: int) -> Tensor:
        """Noise as normalised images have it, the same in every run."""
        like = next(self.model.parameters())
        channels = getattr(getattr(self.model, "model", self.model), "in_chans", 3)
        noise = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
        return noise.to(like.device, like.dtype)

    def others(self) -> list[Tensor]:
        """Images that differ from the example in what may vary."""
        _, _, height, width = self.example.shape
        step = coarsest(self.model)
        found = [] if self.vary == "none" else [self.images(n, height, width) for n in (1, 3)]
        if self.vary == "size":
            found.append(self.images(1, height + step, width - step))
            if all(side % step == 0 and side >= 2 * step for side in self.size):
                found.append(self.images(1, *self.size))
        return found

    @cached_property
    def reference(self) -> nn.Module:
        """What the file must do the same as."""
        return int8_weights(self.model) if self.int8 else self.model

    def prepared(self, plain: bool) -> nn.Module:
        """The model as it is traced."""
        model = self.model if self.vary == "size" else for_one_size(self.model, self.example.shape[2:])
        model = as_plain(model) if plain else model
        return int8_weights(model) if self.int8 else model

    def exported(self, plain: bool) -> torch.export.ExportedProgram:
        shape: dict[int, Any] = {}
        if self.vary != "none":
            shape[0] = torch.export.Dim("batch", min=1)
        if self.vary == "size":
            step = coarsest(self.model)
            shape |= {axis: step * torch.export.Dim(name, min=2) for axis, name in ((2, "rows"), (3, "columns"))}
        with torch.no_grad():
            return torch.export.export(self.prepared(plain), (self.example,), dynamic_shapes=(shape,))


@dataclass(frozen=True)
class Program:
    """A file that has been read: call `run` with images; `about` is what was put into it."""

    run: Callable[[Tensor], list[Tensor]]
    about: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Args:
        suffix: of its files.
        help: one line of what runs it.
        scans: the forms of the scan that it can hold, the usual one first.
        int8: whether weights may be int8.
        needs: packages beside torch.
        write: (request, plain, path).
        read: path -> program.
        ending: of a file's name, without which it cannot be read.
    """

    suffix: str
    help: str
    scans: tuple[str, ...]
    int8: bool
    needs: tuple[str, ...]
    write: Callable[[Request, bool, Path], None]
    read: Callable[[Path], Program]
    ending: str = ""

    def scan(self, request: Request) -> str:
        return request.scan or self.scans[0]


def listed(outputs: Any) -> list[Tensor]:
    """What a model gives, logits or maps, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _write_pt2(request: Request, plain: bool, path: Path) -> None:
    torch.export.save(request.exported(plain), path, extra_files={ABOUT: json.dumps(dict(request.about))})


def _read_pt2(path: Path) -> Program:
    extra = {ABOUT: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return Program(lambda images: listed(module(images)), json.loads(extra[ABOUT]))


def _write_aoti(request: Request, plain: bool, path: Path) -> None:
    options: dict[str, Any] = {"aot_inductor.metadata": {ABOUT: json.dumps(dict(request.about))}}
    if sys.platform == "linux":
        options |= _NO_CODE_ON_THE_STACK
    torch._inductor.aoti_compile_and_package(request.exported(plain), package_path=str(path), inductor_configs=options)
    _try_to_load(path)


def _try_to_load(path: Path) -> None:
    """Load a package in a process of its own: where PyTorch cannot do it, it may end the process, not to be this one.

    Raises: RuntimeError with what that process ended with.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _LOADING, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:]
        ended = signal.Signals(-done.returncode).name if done.returncode < 0 else " ".join(told)
        raise RuntimeError(
            f"PyTorch {torch.__version__} compiled a package that it cannot load here, a process that tried to ended "
            f"with {ended}; take another format, or another version of PyTorch"
        )


def _read_aoti(path: Path) -> Program:
    compiled = torch._inductor.aoti_load_package(str(path))
    return Program(lambda images: listed(compiled(images)), json.loads(compiled.get_metadata()[ABOUT]))


def _names(request: Request) -> list[str]:
    with torch.no_grad():
        outputs = request.model(request.example)
    return ["logits"] if isinstance(outputs, Tensor) else [f"map_{i}" for i in range(len(outputs))]


def _write_onnx(request: Request, plain: bool, path: Path) -> None:
    written = torch.onnx.export(
        request.exported(plain),
        (request.example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=_names(request),
    )
    assert written is not None
    written.model.metadata_props[ABOUT] = json.dumps(dict(request.about))
    written.save(str(path), external_data=False)


@parse_args("v", "is", "v", "f")
def _rms_norm(g: Any, x: Any, shape: list[int], weight: Any, eps: float) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, for the exporter of TorchScript, which has none."""
    last, small = (g.op("Constant", value_t=torch.tensor(value)) for value in ([-1], eps))
    mean = g.op("ReduceMean", g.op("Mul", x, x), last, keepdims_i=1)
    return g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean, small))), weight)


def _write_onnx_script(request: Request, plain: bool, path: Path) -> None:
    import onnx

    names = _names(request)
    varying = {} if request.vary == "none" else {name: {0: "batch"} for name in ("images", *names)}
    torch.onnx.register_custom_op_symbolic("aten::rms_norm", _rms_norm, _OPSET)
    # The exporter would print the whole graph where it fails: it asks whether it may in a way that is always true.
    with mock.patch.object(torch._C, "_jit_set_onnx_log_enabled", lambda on: None):
        torch.onnx.export(
            request.prepared(plain),
            (request.example,),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=names,
            dynamic_axes=varying,
        )
    model = onnx.load(str(path))
    model.metadata_props.add(key=ABOUT, value=json.dumps(dict(request.about)))
    onnx.save(model, str(path))


def _read_onnx(path: Path) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        arrays = session.run(None, {"images": images.cpu().numpy()})
        return [torch.from_numpy(array).to(images.device) for array in arrays]

    return Program(run, json.loads(session.get_modelmeta().custom_metadata_map[ABOUT]))


def _write_torchscript(request: Request, plain: bool, path: Path) -> None:
    model = request.prepared(plain)
    with torch.no_grad():
        # The tables of the plain scan are computed while it is traced, by code that TorchScript cannot read.
        scripted = torch.jit.trace(model, request.example, strict=False) if plain else torch.jit.script(model)
    torch.jit.save(scripted, str(path), _extra_files={ABOUT: json.dumps(dict(request.about)).encode()})


def _read_torchscript(path: Path) -> Program:
    extra = {ABOUT: ""}
    module = torch.jit.load(str(path), _extra_files=extra)
    return Program(lambda images: listed(module(images)), json.loads(extra[ABOUT]))


_BOTH = SCANS
_PLAIN = ("plain",)
_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "pt2": Format(".pt2", "torch.export: Python with torch", _BOTH, True, (), _write_pt2, _read_pt2),
    "aoti": Format(
        ".aoti.pt2", "AOTInductor: compiled, for C++ or Python", _BOTH[::-1], False, (), _write_aoti, _read_aoti, ".pt2"
    ),
    "onnx": Format(".onnx", "ONNX, by torch.export", _PLAIN, False, _ONNX, _write_onnx, _read_onnx),
    "onnx_script": Format(
        ".script.onnx", "ONNX, by TorchScript, which is quicker", _PLAIN, False, _ONNX, _write_onnx_script, _read_onnx
    ),
    "torchscript": Format(
        ".torchscript.pt", "TorchScript: any torch", _BOTH, False, (), _write_torchscript, _read_torchscript
    ),
}


def refusal(name: str, request: Request) -> str | None:
    """Why a format cannot hold what is requested, with the way out; None if it can."""
    chosen = FORMATS[name]
    missing = [package for package in chosen.needs if importlib.util.find_spec(package) is None]
    if missing:
        return f"it needs {', '.join(missing)}; pip install 'vision-mamba-timm[export]' brings them."
    if chosen.scan(request) not in chosen.scans:
        return (
            "it cannot call this library's operator, which is Python where it is registered; "
            "leave the scan to the format, or take 'plain'."
        )
    if request.int8 and not chosen.int8:
        having = ", ".join(other for other, known in FORMATS.items() if known.int8)
        return f"it cannot hold torchao's int8 weights; take {having}."
    if request.int8 and importlib.util.find_spec("torchao") is None:
        return "int8 weights need torchao; pip install 'vision-mamba-timm[export]' brings it."
    if request.vary == "size" and chosen.scan(request) == "plain":
        having = ", ".join(other for other, known in FORMATS.items() if "operator" in known.scans)
        return (
            f"the plain scan is laid out for one grid of tokens; vary the batch alone, or keep the operator: {having}."
        )
    if request.vary == "size" and not takes_any_size(request.model):
        return "the model takes images of one size; create it with dynamic_img_size=True, or vary the batch alone."
    return None
