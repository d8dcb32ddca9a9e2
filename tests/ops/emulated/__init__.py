"""The CUDA backend on a CPU: its plans as they are, its kernels compiled by the C++ compiler of the machine.

Of a kernel's source the statements in assembly are written in C++ (`RULES`), everything else is compiled as it stands
against `runtime.h`. That tells whether indices, exchanges and barriers are right; not whether it is fast, nor what a
GPU's caches and memory model do to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vision_mamba.ops.backends import backward_cuda, cuda, forward_cuda, gpu, launch, nvrtc, shares_cuda
from vision_mamba.ops.backends.sources import source_dir
from vision_mamba.ops.call import GRADIENTS, ScanCall

COMPILER = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")

FLAGS = "VISION_MAMBA_EMULATED"  # more options for the compiler, such as -fsanitize=thread -g

#: What a statement in assembly contains, and what it does to its operands in C++; the first that is found in it counts.
RULES = (
    ("ex2.approx", "{0} = exp2f({1});"),
    ("rcp.approx", "{0} = 1.f / {1};"),
    ("set.eq.f32", "{0} = {1} == {2} ? 1.f : 0.f;"),
    ("mul.wide.u32", "{0} = (unsigned long long)(unsigned)({1}) * (unsigned)({2});"),
    ("mul.wide.s32", "{0} = (long long)(int)({1}) * (int)({2});"),
    ("fma.rn.bf16x2", "{0} = emulated::sum_bfloats({1}, {3});"),  # times 1
    ("cvt.f32.f16", "{0} = emulated::of_half({1});"),
    ("cvt.rn.f16.f32", "{0} = emulated::to_half({1});"),
    ("cvt.rn.f16x2", "{0} = emulated::pair(emulated::to_half({2}), emulated::to_half({1}));"),
    ("cvt.rn.bf16x2", "{0} = emulated::pair(emulated::to_bfloat({2}), emulated::to_bfloat({1}));"),
    (
        "m16n8k16",
        "emulated::multiply<16, 2>(d, {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, "
        "emulated::bfloat_at);",
    ),
    (
        "m16n8k8.row.col.f32.bf16",
        "emulated::multiply<8, 2>(d, {{0, 0, 0, 0}}, {{{4}, {5}}}, {{{6}}}, emulated::bfloat_at);",
    ),
    (
        "m16n8k8.row.col.f32.f16",
        "emulated::multiply<8, 2>(d, {{0, 0, 0, 0}}, {{{4}, {5}}}, {{{6}}}, emulated::half_at);",
    ),
    (
        "m16n8k8",
        "emulated::multiply<8, 1>(d, {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, emulated::tf32_at);",
    ),
    ("movmatrix", "{0} = emulated::transposed({1});"),
    ("shfl.sync.idx.b32 %0, %1, %2, 0x21f", "{0} = emulated::from_lane({1}, (emulated::lane() & 2) | ({2} & ~2));"),
    ("cp.async.commit_group", "emulated::commit();"),
    ("cp.async.wait_group", "emulated::finish({0});"),
    ("cp.async.wait_all", "emulated::commit(), emulated::finish(0);"),
    ("setp.eq.u32 none, %2, 0; cp.async", "emulated::copy_later({0}, {2} ? (const void*)({1}) : nullptr, 16);"),
    ("setp.eq.u32 none, %3, 0; cp.async", "emulated::copy_later({0}, {3} ? (const void*)({1}) : nullptr, {2});"),
    ("[%0], [%1], %2;", "emulated::copy_later({0}, (const void*)({1}), {2});"),
    ("[%0], [%1], 16;", "emulated::copy_later({0}, (const void*)({1}), 16);"),
    ("bar.sync %0, 64", "emulated::barrier({0}, 64, true);"),
    ("bar.arrive %0, 64", "emulated::barrier({0}, 64, false);"),
    ("bar.sync %0, %1", "emulated::barrier({0}, {1}, true);"),
    ("barrier.sync %0, %1", "emulated::barrier({0}, {1}, true);"),
    ("barrier.arrive %0, %1", "emulated::barrier({0}, {1}, false);"),
    ("mbarrier.init.shared::cta.b64 [%0], 1;", "emulated::begin_mailbox({0}, 1);"),
    ("mbarrier.init", "emulated::begin_mailbox({0}, {1});"),
    ("mbarrier.arrive.expect_tx", "emulated::arrive({0}, {1});"),
    ("mbarrier.arrive", "emulated::arrive({0});"),
    ("bra again", "while (!emulated::arrived({0}, {1}));"),
    ("mbarrier.try_wait", "{0} = emulated::arrived({1}, {2});"),
    ("fence.mbarrier_init", ";"),
    ("cluster_ctarank", "{0} = emulated::rank();"),
    ("mapa", "{0} = emulated::place_at({1}, {2});"),
    ("barrier.cluster.arrive", "emulated::meet();"),
    ("barrier.cluster.wait", "emulated::await_all();"),
    ("@w st.async", "if ({4}) emulated::send({0}, {3}, {1}, {2});"),
    ("st.async", "emulated::send({0}, {2}, {1});"),
    ("ld.relaxed", "if (!({0} = *({1}))) emulated::pause();"),
    ("st.relaxed", "*({0}) = {1};"),
    ("ld.global.u32", "{0} = *(const unsigned*)({1});"),
    ("ld.global.u16", "{0} = *(const unsigned short*)({1});"),
    ("ld.global.v2", "emulated::load((const char*)({2}), {0}, {1});"),
    ("ld.global.v4", "emulated::load((const char*)({4}), {0}, {1}, {2}, {3});"),
    ("red.release.gpu.global.add", "__atomic_fetch_add({0}, {1}, __ATOMIC_RELEASE);"),
    ("atom.acq_rel.gpu.global.add", "{0} = __atomic_fetch_add({1}, 1, __ATOMIC_ACQ_REL);"),
    ("ld.acquire.gpu", "{0} = __atomic_load_n({1}, __ATOMIC_ACQUIRE);"),
    ("createpolicy", ";"),
    ("prefetch", ";"),
    ("ld.global.nc.L2::128B.u16", "{0} = emulated::read<unsigned short>({1});"),
    ("ld.global.nc", "{0} = emulated::read<unsigned>({1});"),
    ("@p st.global.v2", "if ({0}) emulated::store({1}, {2}, {3});"),
    ("st.global.cs.v4", "emulated::store({0}, {1}, {2}, {3}, {4});"),
    ("st.global.v4", "emulated::store({0}, {1}, {2}, {3}, {4});"),
    ("st.shared.f32", "emulated::store(emulated::shared({0}), {1});"),
    ("ld.shared.v4", "emulated::load(emulated::shared({4}), {0}, {1}, {2}, {3});"),
)


def parts(code: str, mark: str) -> list[str]:
    """Code between the marks that stand in no parentheses and no string."""
    found, depth, quoted = [""], 0, False
    for letter in code:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "([{") - (letter in ")]}")
        if letter == mark and not quoted and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def statements(code: str) -> Iterator[tuple[int, int]]:
    """Where statements in assembly begin and end."""
    for found in re.finditer(r"\basm\b(\s+volatile)?\s*\(", code):
        end, depth, quoted = found.end(), 1, False
        while depth:
            quoted ^= code[end] == '"'
            depth += 0 if quoted else (code[end] == "(") - (code[end] == ")")
            end += 1
        yield found.start(), end + 1


def in_cpp(statement: str) -> str:
    template, *operands = parts(statement[statement.index("(") + 1 : -2], ":")
    if template.strip() == '""':
        return ";"
    given = [operand.strip() for list_ in operands[:2] for operand in parts(list_, ",") if operand.strip()]
    values = [f"({operand[operand.index('(') + 1 : -1]})" for operand in given]
    for key, meaning in RULES:
        if key in template:
            return meaning.format(*values)
    raise NotImplementedError(f"no rule says what this does: {statement}")


@functools.cache
def source(name: str) -> str:
    """A kernel with all that it includes, in C++."""
    seen: set[str] = set()

    def read(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (source_dir() / "cuda" / file).read_text()
        text = text.replace("#pragma once", "")
        return re.sub(r'#include "(\w+\.cuh)"', lambda found: read(found[1]), text)

    code, done, pieces = read(f"{name}.cuh"), 0, []
    for begin, end in statements(code):
        pieces += [code[done:begin], in_cpp(code[begin:end])]
        done = end
    code = "".join([*pieces, code[done:]])
    code = re.sub(r"extern __shared__[^;]*?(\w+)\[\];", r"char* \1 = emulated::shared();", code)
    code = re.sub(r"\b__shared__\b", "static", code)
    return f"""#include "runtime.h"
{code}
extern "C" void run_it(const void* argument, unsigned blocks, unsigned threads, size_t bytes, unsigned joined) {{
    const auto& given = *({"Sums" if name == "sums" else "Params"}*)argument;
    emulated::run([&] {{ {name}(given); }}, blocks, threads, bytes, joined);
}}
"""


def built(code: str, macros: tuple[tuple[str, str], ...] = (), *more: str) -> Path:
    """What the compiler makes of C++, kept for the next time."""
    here = Path(__file__).parent
    options = [
        "-std=c++20",
        "-O1",
        "-w",
        f"-I{here}",
        *more,
        *os.environ.get(FLAGS, "").split(),
        *(f"-D{name}={value}" for name, value in macros),
    ]
    key = hashlib.sha256(repr((code, (here / "runtime.h").read_text(), options)).encode()).hexdigest()[:32]
    place = nvrtc.cache_dir() / "emulated"
    place.mkdir(exist_ok=True)
    result = place / key
    if not result.exists():
        with tempfile.TemporaryDirectory(dir=place) as aside:
            file, made = Path(aside) / "code.cpp", Path(aside) / "made"
            file.write_text(code)
            outcome = subprocess.run([*COMPILER, *options, str(file), "-o", str(made)], capture_output=True, text=True)
            assert outcome.returncode == 0, outcome.stderr[:6000]
            os.replace(made, result)  # two processes may build the same
    return result


@functools.cache
def library(wanted: nvrtc.Specialisation) -> ctypes.CDLL:
    return ctypes.CDLL(str(built(source(wanted.name), wanted.macros, "-shared", "-fPIC")))


used: set[str] = set()  # names of kernels


class Bound(NamedTuple):
    params: array[int]
    start: functools.partial[None]

    def launch(self, stream: int) -> None:
        self.start()


#: Kernels whose blocks read what others of them write while these go on: they run in turn, as those of a cluster do.
AT_ONCE = ("wave_backward",)


class Kernel(NamedTuple):
    """What nvrtc.Kernel is on a GPU."""

    wanted: nvrtc.Specialisation
    threads: int
    shared: int
    joined: int = 1

    def bound(self, grid: int, params: array[int], threads: int = 0, more_shared: int = 0) -> Bound:
        argument = ctypes.c_void_p(params.buffer_info()[0])
        bytes_ = ctypes.c_size_t(self.shared + more_shared)
        run = library(self.wanted).run_it
        used.add(self.wanted.name)
        joined = grid if self.wanted.name in AT_ONCE else self.joined
        return Bound(params, functools.partial(run, argument, grid, threads or self.threads, bytes_, joined))

    def runs(self, threads: int, more_shared: int) -> bool:
        return True


@functools.cache
def kernel(wanted: nvrtc.Specialisation, device: int | None) -> Kernel:
    threads, shared = (ctypes.c_int * 2).in_dll(library(wanted), "launch_shape")
    macros = dict(wanted.macros)
    return Kernel(wanted, threads, shared, int(macros.get("CLUSTER", 1)) * int(macros.get("TOGETHER", 1)))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The functions of the backend `cuda` take tensors on the CPU, as if it were a small GPU with an H200's
    multiprocessors. Names of kernels are added to what it gives as they are used."""
    if not COMPILER:
        pytest.skip("no C++ compiler: CXX names none, and g++ is not on the path")
    monkeypatch.setattr(nvrtc, "kernel", kernel)
    monkeypatch.setattr(nvrtc, "shared_limit", lambda device: 227 * 1024)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    for module in (forward_cuda, backward_cuda):
        monkeypatch.setattr(module, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(forward_cuda, "runners", launch.Plans())
    monkeypatch.setattr(backward_cuda, "plans", launch.Plans())
    for name in ("_merges", "_finishes"):
        monkeypatch.setattr(shares_cuda, name, launch.Plans())
    used.clear()
    return used


def run(call: ScanCall, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and every gradient by name, as tests.cases.run has them."""
    y, last, saved = cuda.forward(call, True)
    outputs = dict(y=y) | (dict(last_state=last) if call.return_last_state else {})
    generator = torch.Generator().manual_seed(seed)
    # As the outputs lie in memory; rounded, so that every type sees the same numbers.
    grads = [torch.empty_like(o).copy_(torch.randn(o.shape, generator=generator).bfloat16()) for o in outputs.values()]
    found = cuda.backward(call, saved, grads[0], grads[1] if call.return_last_state else None)
    return outputs | {
        f"d{name}": t for name, t in zip(GRADIENTS, found, strict=True) if getattr(call, name) is not None
    }
