"""What runs here: versions, devices, each backend with the exact fix if it does not run, and a self-test in seconds.

    python -m vision_mamba.doctor            # exit status 1 if anything computes wrong numbers or fails
    python -m vision_mamba.doctor --json     # the same for a bug report

A backend that has no device here is not broken, and a slow one is a warning: both leave the exit status 0.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import logging
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import vision_mamba
from vision_mamba import ops, selftest
from vision_mamba.ops import registry
from vision_mamba.ops.backends import nvrtc

OK, ABSENT, WARNING, BROKEN = "ok", "absent", "warning", "broken"
_MARKS = {OK: "+", ABSENT: "-", WARNING: "!", BROKEN: "X"}
_NAME_WIDTH = 28
_COLOURS = {OK: "green", ABSENT: "dim", WARNING: "yellow", BROKEN: "red"}

# What the library stands on, under each name that it is distributed by; the first found is shown.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "timm": ("timm",),
    "numpy": ("numpy",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"),
    "cuda-core": ("cuda-core",),
    "NVRTC": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu11"),
    "torchvision": ("torchvision",),
}
_INSTRUCTION_SETS = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve", "sve2")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        topic: the part of the report that it belongs to.
        name: what was looked at.
        value: what was found, with the way out where there is something to do.
        verdict: ok, absent (not here and not missed), warning (slower than need be) or broken (wrong or not at all).
    """

    topic: str
    name: str
    value: str
    verdict: str = OK


def versions() -> Iterator[Finding]:
    """Of this library, Python and what both stand on."""
    yield Finding("versions", "vision_mamba", f"{vision_mamba.__version__} in {Path(__file__).parent}")
    yield Finding("versions", "python", platform.python_version())
    for name, distributions in _DISTRIBUTIONS.items():
        found = next(filter(None, map(_version, distributions)), None)
        yield Finding("versions", name, found or "not installed", OK if found else ABSENT)


def _version(distribution: str) -> str | None:
    if distribution == "torch":
        return torch.__version__  # with the build, such as +cpu, which the distribution may leave out
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> Iterator[Finding]:
    """Operating system, processor and accelerators."""
    yield Finding("machine", "system", platform.platform())
    # Older versions of torch do not tell them one by one.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    sets = [name for name in _INSTRUCTION_SETS if capabilities.get(name)]
    processor = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    vector = ", ".join(sets) or torch.backends.cpu.get_cpu_capability()
    yield Finding("machine", "cpu", f"{processor}, {torch.get_num_threads()} threads, {vector}")
    for device in _devices()[1:]:
        yield Finding("machine", str(device), _describe(device))
    if not torch.accelerator.is_available():
        yield _why_no_accelerator()


def _devices() -> list[torch.device]:
    """The CPU and every accelerator that torch sees."""
    kind = torch.accelerator.current_accelerator()
    others = [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())] if kind else []
    return [torch.device("cpu"), *others]


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} device"
    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}" if torch.version.cuda else properties.gcnArchName
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _why_no_accelerator() -> Finding:
    if not Path("/proc/driver/nvidia/version").exists():
        return Finding("machine", "accelerator", "none found", ABSENT)
    if torch.version.cuda is None:
        way_out = "this torch is built without CUDA; install a CUDA build, see https://pytorch.org"
    else:
        way_out = f"torch is built for CUDA {torch.version.cuda}; update the driver if nvidia-smi shows an older one"
    return Finding("machine", "accelerator", f"there is an NVIDIA driver, but {way_out}", WARNING)


def backends() -> Iterator[Finding]:
    """Which implementations of the scan run on which device, in order of preference."""
    for device in _kinds_of_device():
        reasons = ops.available_backends(device)
        slow = not any(reason is None and registry.get(name).fast for name, reason in reasons.items())
        for name, reason in reasons.items():
            fast = registry.get(name).fast
            # What is missing is a loss only while nothing fast takes its place; the CPU has one fast backend, its own.
            meant_for_it = (name == "cpu") == (device.type == "cpu")
            missed = WARNING if slow and fast and meant_for_it else ABSENT
            value = f"no: {reason}" if reason else "yes" if fast else "yes, slow"
            yield Finding(f"backends on {device.type}", name, value, missed if reason else OK)
        if device.type == "cuda" and reasons["cuda"] is None:
            yield _kept_kernels(f"backends on {device.type}")


def _kept_kernels(topic: str) -> Finding:
    place, obstacle = nvrtc.cache_wanted()
    if obstacle:
        return Finding(topic, "kept kernels", f"none, each process compiles anew: {obstacle}", WARNING)
    return Finding(topic, "kept kernels", f"in {place}")


def _kinds_of_device() -> list[torch.device]:
    """One device of each kind."""
    return list({device.type: device for device in reversed(_devices())}.values())[::-1]


def parity() -> Iterator[Finding]:
    """Every backend that runs here against the loop over time in float64: the output and every gradient."""
    for device in _kinds_of_device():
        for name, reason in ops.available_backends(device).items():
            for dtype in selftest.BOUNDS if reason is None else ():
                label = f"{name} on {device.type}, {_short(dtype)}"
                yield _guarded("self-test", label, functools.partial(_compare, name, device, dtype))


def _guarded(topic: str, name: str, test: Callable[[], Finding]) -> Finding:
    """The finding of a test, or of its failure: a doctor reports what goes wrong and goes on."""
    try:
        return test()
    except Exception as error:
        return Finding(topic, name, f"{type(error).__name__}: {error}", BROKEN)


def _compare(backend: str, device: torch.device, dtype: torch.dtype) -> Finding:
    label = f"{backend} on {device.type}, {_short(dtype)}"
    worst = selftest.compare(backend, device, dtype)
    if worst.passes:
        return Finding("self-test", label, f"output and every gradient right (at worst {worst})")
    way_out = f"use_backend({str(_another(backend, device))!r}) avoids it; please report it with --json"
    return Finding("self-test", label, f"wrong numbers: {worst}; vision_mamba.ops.{way_out}", BROKEN)


def _another(backend: str, device: torch.device) -> str:
    """A backend to use in place of a wrong one."""
    return next(n for n, reason in ops.available_backends(device).items() if reason is None and n != backend)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def models() -> Iterator[Finding]:
    """The smallest model of each family, forward and backward, on every kind of device."""
    for device in _kinds_of_device():
        for name in timm.list_models("test_*"):
            if timm.model_entrypoint(name).__module__.startswith(f"{vision_mamba.__name__}."):
                yield _guarded("self-test", f"{name} on {device.type}", functools.partial(_train_once, name, device))


def _train_once(name: str, device: torch.device) -> Finding:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).to(device)
    logits = model(torch.randn(1, *timm.data.resolve_data_config(model=model)["input_size"], device=device))
    logits.square().mean().backward()
    label = f"{name} on {device.type}"
    finite = {"logits": logits, **{f"gradient of {n}": p.grad for n, p in model.named_parameters()}}
    bad = [n for n, tensor in finite.items() if tensor is None or not tensor.isfinite().all()]
    if bad:
        return Finding("self-test", label, f"{len(bad)} not finite, first {bad[0]}; report this, with --json", BROKEN)
    return Finding("self-test", label, "forward and backward finite")


def examine() -> Iterator[Finding]:
    """The whole report, line by line; takes seconds, or two minutes where kernels for a GPU are compiled first."""
    log = logging.getLogger("vision_mamba")
    before = log.level
    log.setLevel(logging.ERROR)  # the warning of a slow backend refers to this very report
    try:
        for part in (versions, machine, backends, parity, models):
            yield from part()
    finally:
        log.setLevel(before)


def summary(findings: Sequence[Finding]) -> str:
    """The report in a line."""
    broken, warned = (sum(f.verdict == verdict for f in findings) for verdict in (BROKEN, WARNING))
    if broken:
        return f"{broken} broken: see the lines marked {_MARKS[BROKEN]}."
    if warned:
        return f"All numbers right, {warned} warning{'s' * (warned > 1)}: see the lines marked {_MARKS[WARNING]}."
    return "All well."


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _write_plain(finding: Finding) -> None:
    _write(f"  {_MARKS[finding.verdict]} {finding.name:{_NAME_WIDTH}}  {finding.value}")


def _rich_writer() -> Callable[[Finding], None]:
    """As _write_plain, in colour and with long lines wrapped in their column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def write(finding: Finding) -> None:
        style = _COLOURS[finding.verdict]
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(width=3)
        line.add_column(width=_NAME_WIDTH)
        value = Text(finding.value, "" if finding.verdict == OK else style)
        line.add_row(Text(f"  {_MARKS[finding.verdict]}", style), Text(finding.name), value)
        console.print(line)

    return write


def _report(findings: Iterable[Finding], write: Callable[[Finding], None]) -> list[Finding]:
    """Write each finding as it comes, under its topic; returns them all."""
    seen: list[Finding] = []
    for finding in findings:
        if not seen or seen[-1].topic != finding.topic:
            _write(f"\n{finding.topic}")
        write(finding)
        seen.append(finding)
    _write(f"\n{summary(seen)}")
    return seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status: 1 if anything is broken."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m vision_mamba.doctor", description=__doc__, formatter_class=formatter)
    parser.add_argument("--json", action="store_true", help="write JSON, to paste into a bug report")
    options = parser.parse_args(arguments)
    if options.json:
        findings = list(examine())
        _write(json.dumps({"summary": summary(findings), "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        colour = sys.stdout.isatty() and importlib.util.find_spec("rich")
        findings = _report(examine(), _rich_writer() if colour else _write_plain)
    return int(any(finding.verdict == BROKEN for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
