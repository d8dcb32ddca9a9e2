"""The arrows between the rooms of the package, read from the source: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vision_mamba"
NAME = PACKAGE.name


@dataclass(frozen=True)
class Room:
    """What the modules of a room may import, beside the standard library and each other."""

    rooms: frozenset[str]
    outside: frozenset[str]


def room(*rooms: str, outside: str) -> Room:
    return Room(frozenset(rooms), frozenset(outside.split()))


PUBLIC = ("", "layers", "models", "ops", "scans", "ssm", "version")  # "" is the package's own names
ROOMS = {
    "version": room(outside=""),
    "text": room(outside=""),
    "constants": room(outside="torch cuda"),
    "scans": room("constants", outside="torch numpy"),
    "ops": room("constants", outside="torch numpy triton cuda"),
    "ssm": room("ops", outside="torch numpy"),
    "layers": room("constants", "ops", "scans", outside="torch timm"),
    "models": room("layers", "text", outside="torch timm"),
    "": room("models", "ops", "scans", "version", outside=""),
    "train": room(*PUBLIC, "text", outside="torch torchvision timm numpy yaml rich sklearn safetensors PIL wandb"),
    "detection": room(*PUBLIC, "train", "text", outside="torch torchvision timm numpy pycocotools yaml PIL"),
    "viz": room(*PUBLIC, outside="torch timm numpy matplotlib PIL"),
    "export": room(*PUBLIC, "text", outside="torch onnx onnxruntime torchao"),
    "provenance": room("ops", outside="torch"),
    "selftest": room("ops", "scans", outside="torch"),
    "doctor": room(*PUBLIC, "selftest", outside="torch timm rich"),
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    """vision_mamba/ops/call.py -> "ops"; vision_mamba/doctor.py -> "doctor"; vision_mamba/__init__.py -> ""."""
    first = module.parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a module imports, wherever in it; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute in this package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_room(dotted: str) -> str:
    """vision_mamba.ops.call -> "ops"; vision_mamba.__version__ and plain vision_mamba -> ""."""
    second = dotted.removeprefix(NAME).lstrip(".").partition(".")[0]
    return second if second in ROOMS else ""


def complaints(source: str, module: Path) -> list[str]:
    """Imports of a module that its room may not have."""
    here = room_of(module)
    found = []
    for dotted in imported(ast.parse(source)):
        top = dotted.partition(".")[0]
        if top == NAME:
            other = own_room(dotted)
            if other != here and other not in ROOMS[here].rooms:
                found.append(f"{module} imports {dotted}, but {here or NAME} knows {sorted(ROOMS[here].rooms)} alone")
        elif top not in sys.stdlib_module_names and top not in ROOMS[here].outside:
            found.append(f"{module} imports {top}, but {here or NAME} knows {sorted(ROOMS[here].outside)} alone")
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_follow_the_arrows(module: Path) -> None:
    assert room_of(module) in ROOMS, f"{module}: name its room and what that may import in ROOMS"
    assert complaints((PACKAGE / module).read_text(), module) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("ops/call.py", "from vision_mamba.scans import CROSS"),
        ("ops/call.py", "from vision_mamba import scans"),
        ("ops/call.py", "import timm"),
        ("scans/order.py", "from vision_mamba.ops import selective_scan"),
        ("scans/order.py", "def f():\n    import einops"),
        ("layers/ss2d.py", "import vision_mamba.models.vmamba"),
        ("models/vim.py", "from vision_mamba.ops import selective_scan"),
        ("models/vim.py", "from matplotlib import pyplot"),
        ("__init__.py", "from vision_mamba import train"),
        ("viz/orders.py", "from vision_mamba.train import run"),
    ],
)
def test_an_import_against_the_arrows_is_found(module: str, source: str) -> None:
    assert len(complaints(source, Path(module))) == 1


def test_the_arrows_have_no_circle() -> None:
    """Each room can be built after those that it imports."""
    built: set[str] = set()
    while len(built) < len(ROOMS):
        ready = {name for name, room in ROOMS.items() if name not in built and room.rooms <= built}
        assert ready, f"rooms that wait for each other: {sorted(set(ROOMS) - built)}"
        built |= ready


def strings(tree: ast.Module) -> Iterator[str]:
    """String constants, docstrings left out."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_kernel_sources_are_opened_by_the_backends_alone() -> None:
    naming = {m for m in MODULES if any("csrc" in text for text in strings(ast.parse((PACKAGE / m).read_text())))}
    assert naming, "somebody must open the kernels"
    assert all(module.parts[:2] == ("ops", "backends") for module in naming), naming


def test_importing_the_package_brings_no_extra() -> None:
    """What pip installs without extras is enough, and nobody pays for pictures or training who does not ask."""
    extras = ("matplotlib", "sklearn", "rich", "onnx", "pycocotools", "vision_mamba.train", "vision_mamba.viz")
    check = "import sys, torch, timm; before = set(sys.modules); import vision_mamba; "
    check += f"sys.exit(str([m for m in {extras!r} if m in sys.modules and m not in before]))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1:] == ["[]"], done.stderr
