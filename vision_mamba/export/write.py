"""Write a model in a format, read it back, compare, and only then put it where it belongs."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vision_mamba.export.formats import FORMATS, Program, Request, listed, refusal
from vision_mamba.text import nearest

#: Largest difference to the model in PyTorch, over the largest output.
PARITY = 1e-4


class ExportError(Exception):
    """A format cannot hold the model, or what was written does not do the same; the message says why."""


@dataclass(frozen=True)
class Exported:
    """A file that stands, and what was found when it was read back."""

    path: Path
    size: int  # bytes
    scan: str
    difference: float  # the largest found, over the largest output
    program: Program


def export_model(name: str, request: Request, path: str | Path) -> Exported:
    """Write a model, and read the file back and compare it before it replaces what lies at the path.

    Args:
        name: of one of `FORMATS`.
        request: what to write.
        path: of the file; its folder is made.

    Raises: ExportError if the format is unknown, refuses, fails, or does not give what the model gives; what lay at the
        path is untouched then.
    """
    if name not in FORMATS:
        raise ExportError(f"no format is called {name!r}; did you mean {nearest(name, FORMATS)!r}?")
    reason = refusal(name, request)
    if reason is not None:
        raise ExportError(f"{name}: {reason}")
    chosen, path = FORMATS[name], Path(path)
    if not path.name.endswith(chosen.ending):
        raise ExportError(f"{name}: the file's name must end in {chosen.ending}, got {path.name}.")
    scan = chosen.scan(request)
    with _folder_beside(name, path) as folder:
        draft = folder / path.name
        try:
            with torch.no_grad(), _quiet():
                chosen.write(request, scan == "plain", draft)
                program = chosen.read(draft)
                difference = _difference(request, program)
        except OSError as error:
            raise ExportError(f"{name}: {path} cannot be written: {error.strerror or error}.") from error
        except Exception as error:  # exporters and runtimes raise dozens of types
            told = textwrap.shorten(f"{type(error).__name__}: {error}", 600, placeholder=" ...")
            if request.vary == "size":
                told += "; a map of one row or column is taken for a constant: give a larger size, or vary the batch"
            raise ExportError(f"{name}: the model could not be exported and run: {told}") from error
        if not difference <= PARITY:
            width = request.example.dtype
            rounded = "" if width == torch.float32 else f" The model rounds to {width}; export it in float32."
            raise ExportError(
                f"{name}: what was written differs from the model by {difference:.1e} of its largest output, more than "
                f"{PARITY:.0e}; nothing was put at {path}.{rounded}"
            )
        try:
            os.replace(draft, path)
        except OSError as error:  # a folder of that name, for one
            raise ExportError(f"{name}: {path} cannot be written: {error.strerror or error}.") from error
    return Exported(path, path.stat().st_size, scan, difference, program)


def median_ms(run: Callable[[Tensor], object], images: Tensor, runs: int) -> float:
    """Milliseconds a call, the median of so many after three to warm up."""
    found = []
    with torch.inference_mode():
        for _ in range(runs + 3):
            start = time.perf_counter()
            run(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[3:])


def _difference(request: Request, program: Program) -> float:
    found = [0.0]
    for images in (request.example, *request.others()):
        for tensor, other in zip(program.run(images), listed(request.reference(images)), strict=True):
            found.append(relative(tensor, other))
    return max(found)


def relative(result: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest element; infinite where shapes differ or the result is not finite."""
    if result.shape != expected.shape or not bool(result.isfinite().all()):
        return float("inf")
    return float((result - expected).abs().max() / expected.abs().max())


@contextlib.contextmanager
def _folder_beside(name: str, path: Path) -> Iterator[Path]:
    """A folder for drafts on the disk that the file will be on, so that putting it there is one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drafts = tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent)
    except OSError as error:
        raise ExportError(f"{name}: {path} cannot be written: {error.strerror or error}.") from error
    with drafts as folder:
        yield Path(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print the graph of what they fail on, thousands of lines, and warn of what is meant."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
