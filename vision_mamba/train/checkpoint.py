"""Checkpoints: written whole or not at all, read with an error that tells what is wrong with the file.

The layout is timm's (state_dict, state_dict_ema, optimizer, arch, epoch, args, metric), so timm loads them by
`create_model(..., checkpoint_path=...)`. `epoch` and `batch` say where the run stands: so many epochs are done, and so
many batches of the next one. timm's learning-rate schedules and all random numbers are functions of that position.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from vision_mamba.text import shortened
from vision_mamba.train.errors import CheckpointError

LAST, PREVIOUS, BEST, DAMAGED = "last.pth", "previous.pth", "best.pth", "damaged.pth"
_log = logging.getLogger("vision_mamba.train")


def save(state: dict[str, Any], paths: Iterable[str | Path], previous: Path | None = None) -> None:
    """Write a checkpoint to each path; a reader finds the old file or the new one, never a part of it.

    Args:
        previous: where the file at the first path is kept.

    Raises: CheckpointError if the disk is full or not writable; what lay at the paths is untouched then.
    """
    serialised = io.BytesIO()  # torch's own writer of files ends the process when the disk is full
    torch.save(state, serialised)
    for path in map(Path, paths):
        write(path, serialised.getbuffer(), previous)
        previous = None


def write(path: Path, content: bytes | memoryview, previous: Path | None = None) -> None:
    """Write a file whole or not at all; arguments and errors are those of `save`."""
    temporary = path.with_name(f".{path.name}.tmp")  # in the same folder, so that the rename is one step
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        kept = "the one written before is untouched" if path.exists() else "there was none before"
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}; it needs {len(content) / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free; {kept}. Make room, then continue with --resume."
        ) from error
    _sync_folder(path.parent)


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, at no moment being without either."""
    temporary = previous.with_name(f".{previous.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(path, temporary)
    os.replace(temporary, previous)


def newest(run_dir: Path) -> Path | None:
    """The last checkpoint of a run that can be read whole; one that cannot is put aside, aloud.

    Raises: CheckpointError if there are some and none can be read.
    """
    there = [path for path in (run_dir / LAST, run_dir / PREVIOUS) if path.exists()]
    for path, before in itertools.zip_longest(there, there[1:]):
        try:
            read(path)
        except CheckpointError as error:
            if before is None:
                raise CheckpointError(
                    f"{error} There is no other in {run_dir}; to begin again, say --overwrite instead of --resume."
                ) from error
            os.replace(path, run_dir / DAMAGED)
            _log.error("%s\nIt is now %s; going on from the one before it, %s.", error, run_dir / DAMAGED, before)
        else:
            return path
    return None


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on systems that can open a folder."""
    with contextlib.suppress(PermissionError):  # Windows cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """The contents of a .pth or .safetensors file, on the CPU; nothing in it is executed.

    Args:
        trust: let the file bring Python objects of any kind, which may run any code.

    Raises: CheckpointError if there is no such file, it is truncated, or it holds anything but tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        folder, what = (path, "is a folder") if path.is_dir() else (path.parent, "does not exist")
        there = sorted(entry.name for entry in folder.glob("*.pth")) if folder.is_dir() else []
        hint = f"; {folder} has {shortened(there)}" if there else ""
        raise CheckpointError(f"checkpoint {path} {what}{hint}.")
    size = f"{path} ({path.stat().st_size:,} bytes)"
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if _begins_like(path, b"PK\x03\x04") or (_begins_like(path, b"\x80") and "Unsupported" in str(error)):
            raise CheckpointError(
                f"checkpoint {path} holds Python objects besides tensors, which could run code when read: "
                f"{_objects(error)}. If you trust where it comes from, tools/convert.py --trust takes its tensors out."
            ) from error
        raise CheckpointError(f"checkpoint {size} is not a PyTorch file, or damaged.") from error
    except Exception as error:  # torch, zipfile and safetensors each have their own for a damaged file
        if path.stat().st_size == 0:
            what = "is empty"
        elif _begins_like(path, b"PK\x03\x04") and not zipfile.is_zipfile(path):
            what = "is truncated: it begins like a PyTorch file and has no end"
        elif isinstance(error, OSError):
            what = f"cannot be read: {_first_line(error)}"
        else:
            what = f"is not a PyTorch file, or damaged: {_first_line(error)}"
        raise CheckpointError(f"checkpoint {size} {what}. Take an earlier one, or copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}; a dict of tensors was expected.")
    return content


def _begins_like(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _objects(error: Exception) -> str:
    """Which objects torch.load refused, of its long advice."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else _first_line(error)


def _first_line(error: Exception) -> str:
    """What an error says, or its kind where that is no sentence, such as the byte that a reader stumbled over."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if " " in line else type(error).__name__


def weights(content: dict[str, Any], path: str | Path, use_ema: bool = True) -> dict[str, Tensor]:
    """The state_dict in a checkpoint's contents: of the moving average where there is one and it is wanted.

    Raises: CheckpointError if there is none.
    """
    keys = (["state_dict_ema", "model_ema"] if use_ema else []) + ["state_dict", "model"]
    found = next((content[key] for key in keys if content.get(key) is not None), content)
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"checkpoint {path} holds no weights; its keys are {shortened(content) or 'none'}.")
    return clean_state_dict(found)


def check(model: nn.Module, state_dict: dict[str, Any], path: str | Path, arch: str, saved_arch: str | None) -> None:
    """Whether weights are those of a model, all of them and no others.

    Args:
        arch: name of the model. saved_arch: name that the checkpoint gives, if it gives one.

    Raises: CheckpointError that lists keys missing, left over and of another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    extra = [key for key in state_dict if key not in own]
    shapes = [
        f"{key} {_shape(state_dict[key])} in the file, {_shape(own[key])} in the model"
        for key in own
        if key in state_dict and _shape(state_dict[key]) != _shape(own[key])
    ]
    faults = []
    if saved_arch is not None and saved_arch != arch:
        faults.append(f"it was trained as {saved_arch!r}")
    if missing:
        faults.append(f"{len(missing)} of {len(own)} keys missing ({shortened(missing)})")
    if extra:
        faults.append(f"{len(extra)} keys left over ({shortened(extra)})")
    if shapes:
        faults.append(f"{len(shapes)} of another shape ({shortened(shapes, 3)})")
    if faults:
        raise CheckpointError(f"checkpoint {path} does not fit model {arch!r}: {'; '.join(faults)}.")


def load(model: nn.Module, state_dict: dict[str, Any], path: str | Path, arch: str, saved_arch: str | None) -> None:
    """Load weights into a model, all of them and no others; arguments and errors are those of `check`."""
    check(model, state_dict, path, arch, saved_arch)
    model.load_state_dict(state_dict)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def entry(content: dict[str, Any], key: str, path: str | Path) -> Any:
    """One entry of a checkpoint of ours.

    Raises: CheckpointError if the checkpoint was not written by this package's training.
    """
    if key not in content:
        raise CheckpointError(
            f"checkpoint {path} has no entry {key!r}, so it was not written by tools/train.py (entries: "
            f"{shortened(content)}); begin from its weights with --initial-checkpoint."
        )
    return content[key]


def options(path: str) -> dict[str, Any]:
    """The options that a checkpoint was trained with."""
    return dict(entry(read(path), "args", path))
