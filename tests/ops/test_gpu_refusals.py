"""What is said where the CUDA kernels can't run on a GPU: the reason and the way out, once, and the next backend."""

from __future__ import annotations

import builtins
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import Case, make_call
from vision_mamba.ops import registry
from vision_mamba.ops.backends import gpu, nvrtc


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    monkeypatch.setattr(nvrtc, "known_architectures", lambda: (75, 80, 90))
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (12, 6))


def reason(device: str = "cuda") -> str | None:
    return gpu.unavailable.__wrapped__(torch.device(device))


@pytest.mark.parametrize(
    ("where", "name", "found", "said"),
    [
        (torch.version, "hip", "6.4", "built for ROCm; the backend 'triton' is for it"),
        (torch.cuda, "is_available", lambda: False, "check the driver with nvidia-smi"),
        (torch.cuda, "get_device_capability", lambda _: (6, 0), "Tesla P100 has compute capability 6.0; at least 7.0"),
        (
            torch.cuda,
            "get_device_capability",
            lambda _: (7, 0),
            "12.6 compiles for sm_75 to sm_90, not for this sm_70",
        ),
        (torch.cuda, "get_device_capability", lambda _: (12, 0), "install a torch built for another CUDA version"),
        (nvrtc, "missing", lambda: "run `pip install cuda-core`.", "run `pip install cuda-core`"),
    ],
)
def test_a_gpu_that_will_not_do_is_told_of(
    where: Any, name: str, found: Any, said: str, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason() is None
    assert "move them with .to('cuda')" in str(reason("cpu"))
    monkeypatch.setattr(where, name, found)
    assert said in str(reason())


@pytest.mark.parametrize(
    ("package", "way_out"), [("cuda.core", "pip install cuda-core"), ("cuda.bindings", "pip install nvidia-cuda-nvrtc")]
)
def test_missing_compilers_are_named(package: str, way_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    importing = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(f"No module named {package!r}")
        return importing(name, *rest)

    def absent_module(name: str) -> Any:
        return absent(name)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr(nvrtc.importlib, "import_module", absent_module)
    nvrtc.compiler_version.cache_clear()
    said = nvrtc.missing()
    nvrtc.compiler_version.cache_clear()
    assert said is not None and f"No module named {package!r}" in said and f"`{way_out}`" in said


def test_the_next_backend_is_taken_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_announced", set())
    for name, backend in list(registry.scans.backends.items()):
        if backend.fast:
            there = replace(backend, unavailable=lambda device, name=name: f"{name} is broken; mend it.")
            monkeypatch.setitem(registry.scans.backends, name, there)
    call = make_call(Case())
    with caplog.at_level(logging.WARNING, "vision_mamba"):
        assert [registry.choose(call, None).name for _ in range(3)] == ["eager"] * 3
    (record,) = caplog.records
    assert "cuda is broken; mend it." in record.getMessage() and "vision_mamba.doctor" in record.getMessage()
