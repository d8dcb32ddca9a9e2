"""Where a measurement comes from: which code ran when on which machine, the same in every record."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from vision_mamba.ops.backends import cpu

#: Names the commit where there is no git to ask, such as in a copy of the tree on another machine.
COMMIT_VARIABLE = "VISION_MAMBA_COMMIT"

#: Names a file with what `git ls-tree -r` told of that commit, which the copy is then compared with.
TREE_VARIABLE = "VISION_MAMBA_TREE"

_log = logging.getLogger("vision_mamba")
_ROOT = Path(__file__).resolve().parents[1]


def provenance(device: torch.device | str = "cpu", *covered: str) -> dict[str, Any]:
    """What every line of results/ begins with.

    Args:
        device: what the measurement runs on.
        covered: paths in the checkout whose changes since the commit make the record "dirty"; all that git tracks by
            default.

    Returns: commit, dirty, date (UTC), device, torch; on a CPU the threads and the kernel's instruction set too. The
        commit is None, and dirty with it, where neither git nor the environment variable VISION_MAMBA_COMMIT tells it,
        which is said in the log; dirty alone is None where that variable names the commit without VISION_MAMBA_TREE.
    """
    device = torch.device(device)
    record = {
        **_commit(covered),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": _name(device),
        "torch": torch.__version__,
    }
    if device.type == "cpu":
        level = os.environ.get(cpu.LEVEL_VARIABLE) or next(iter(cpu.levels()), None)
        record |= {"threads": torch.get_num_threads(), "level": level}
    return record


def _commit(covered: tuple[str, ...]) -> dict[str, Any]:
    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        tree = os.environ.get(TREE_VARIABLE)
        return {"commit": named, "dirty": None if not tree else _differs(Path(tree), covered)}
    try:
        changes = _git("status", "--porcelain", *(("--", *covered) if covered else ("--untracked-files=no",)))
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        _log.warning("provenance: %s is no git checkout, so the record names no commit; set %s", _ROOT, COMMIT_VARIABLE)
        return {"commit": None, "dirty": None}


def _differs(tree: Path, covered: tuple[str, ...]) -> bool:
    """Whether a file of the commit is missing here or has another content, by the hashes that git gives contents."""
    for line in tree.read_text(encoding="utf-8").splitlines():
        about, name = line.split("\t", 1)
        path = _ROOT / name
        if covered and not any(path.is_relative_to(_ROOT / part) for part in covered):
            continue
        content = path.read_bytes() if path.is_file() else b""
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if not path.is_file() or blob != about.split()[2]:
            _log.warning("provenance: %s is not as in the commit", name)
            return True
    return False


def _git(*arguments: str) -> str:
    # Of this folder and no folder above it, whose repository would be another one.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(_ROOT.parent)}
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


def _processor() -> str:
    """The processor's name and family, which tell more together when a hypervisor hides the name."""
    wanted = ("model name", "cpu family", "model", "stepping")
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return found["model name"] + " (" + ", ".join(f"{key} {found[key]}" for key in wanted[1:] if key in found) + ")"
