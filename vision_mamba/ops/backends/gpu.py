"""What the CUDA kernels ask of a GPU: whether they run there, how new it is, how many multiprocessors it has."""

from __future__ import annotations

import functools

import torch

from vision_mamba.ops.backends import nvrtc


@functools.cache
def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its tensors are on {device.type}; move them with .to('cuda')."
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the backend 'triton' is for it."
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver with nvidia-smi, and that torch is a CUDA build."
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < nvrtc.OLDEST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; at least 7.0 is needed."
    reason = nvrtc.missing()
    if reason is None and 10 * major + minor not in nvrtc.known_architectures():
        version, known = ".".join(map(str, nvrtc.compiler_version())), nvrtc.known_architectures()
        return (
            f"NVRTC {version} compiles for sm_{known[0]} to sm_{known[-1]}, not for this sm_{major}{minor}; "
            f"install a torch built for another CUDA version."
        )
    return reason


@functools.cache
def capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
