"""Build steps that pyproject.toml cannot say: the optional C++ kernel, csrc and a page of docs as package data.

The kernel is one shared library without Python's or torch's headers, opened with ctypes. Its source is compiled once
for every instruction set that the compiler knows; the library asks the processor when it runs. Without a working
compiler the package installs all the same and falls back to plain torch.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = "csrc"
PAGE = os.path.join("docs", "state_spaces.md")

COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
# GCC 12 takes the undefined operands in its own intrinsics for mistakes, and warns of an ABI that no call here uses.
COMMON += ["-Wno-maybe-uninitialized", "-Wno-psabi"]

# Instruction set -> flags of its copy of the kernel. The baseline is what every processor of the platform has.
LEVELS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
    LEVELS |= {"avx2": avx2, "avx512": avx2 + avx512}


class BuildKernel(build_ext):
    """Compile csrc/cpu/level.cpp once per instruction set and csrc/cpu/library.cpp once, and link them."""

    def build_extension(self, ext: Extension) -> None:
        objects, macros = [], []
        for level, flags in LEVELS.items():
            try:
                objects += self._compile("level.cpp", level, COMMON + flags, [("VISION_MAMBA_LEVEL", level)])
            except Exception:
                if level == "baseline":
                    raise
                logging.warning("the compiler does not know %s; the kernel is built without it", level)
                continue
            macros.append((f"VISION_MAMBA_{level.upper()}", None))
        objects += self._compile("library.cpp", "library", COMMON, macros)
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.compiler.link_shared_object(objects, path, extra_postargs=["-pthread"], target_lang="c++")

    def _compile(self, source: str, folder: str, flags: list[str], macros: list[tuple[str, str | None]]) -> list[str]:
        output = os.path.join(self.build_temp, folder)
        path = os.path.join(SOURCES, "cpu", source)
        return self.compiler.compile([path], output_dir=output, macros=macros, extra_postargs=flags)


class BuildSources(build_py):
    """Put csrc and the page of docs beside the modules; an editable install has them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = os.path.join(self.build_lib, "vision_mamba", "_csrc")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(SOURCES, target)
            shutil.copy(PAGE, os.path.join(self.build_lib, "vision_mamba", "ssm"))


kernel = Extension(
    "vision_mamba._cpu",
    sources=[os.path.join(SOURCES, "cpu", name) for name in ("level.cpp", "library.cpp")],
    language="c++",
    optional=True,
)

setup(
    # The kernel needs GCC's vector extensions, which Microsoft's compiler lacks.
    ext_modules=[] if sys.platform == "win32" else [kernel],
    cmdclass={"build_ext": BuildKernel, "build_py": BuildSources},
)
