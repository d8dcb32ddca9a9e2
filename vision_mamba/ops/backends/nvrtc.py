"""Run-time compilation of csrc/cuda: NVRTC through NVIDIA's cuda-core, a cache on disk, and launches in microseconds.

A kernel is a source file and its macros. Its machine code is kept under a name that holds a hash of all sources, the
flags, the architecture and the compiler's version, so that nothing stale is ever found. Entries are written aside and
renamed, which makes processes that race harmless; an entry that does not match its own checksum is built again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import logging
import os
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vision_mamba.constants import relaxed
from vision_mamba.ops.backends.sources import source_dir

_log = logging.getLogger("vision_mamba")

OLDEST = (7, 0)  # compute capability: independent thread scheduling, which the exchanges between lanes rely on
_STANDARD = "c++17"
_CHECKSUM = hashlib.sha256().digest_size


class Specialisation(NamedTuple):
    """One kernel to compile: the source `<name>.cuh` of csrc/cuda, whose entry point has that name, and its macros."""

    name: str
    macros: tuple[tuple[str, str], ...]


class Kernel(NamedTuple):
    """A compiled kernel on one device."""

    handle: int
    threads: int  # of a block; 0 = chosen at each launch
    shared: int  # bytes of dynamic shared memory a block takes at least

    def bound(self, grid: int, params: array[int], threads: int = 0, more_shared: int = 0) -> Bound:
        """Ready to be launched; `params` are the eight-byte fields of its argument in their order.

        What the driver reads at a launch is laid out in C once: to do it each time takes as long as the launch itself.
        """
        pointers, queue = (ctypes.c_void_p * 1)(params.buffer_info()[0]), ctypes.c_void_p()
        arguments = (
            ctypes.c_void_p(self.handle), grid, 1, 1, threads or self.threads, 1, 1, self.shared + more_shared, queue,
            pointers, None,
        )  # fmt: skip
        return Bound(params, queue, functools.partial(_launcher(), *arguments), arguments)


class Bound(NamedTuple):
    """A kernel and its argument, for one thread at a time: `params` are filled in, then it is launched."""

    params: array[int]
    queue: ctypes.c_void_p
    starter: Callable[[], int]
    arguments: tuple[Any, ...]

    def launch(self, stream: int) -> None:
        """Start it on a stream of the current device."""
        self.queue.value = stream
        status = self.starter()
        if status:
            self._launch_again(status)

    def _launch_again(self, status: int) -> None:
        """Once more, if it failed for want of what a new thread does not have yet."""
        from cuda.bindings import driver

        if driver.CUresult(status) == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            _use_context(torch.cuda.current_device())
            status = self.starter()
        if status:
            _, grid, _, _, threads, _, _, shared, *_ = self.arguments
            raise RuntimeError(
                f"vision_mamba: a kernel could not be launched with {grid} blocks of {threads} threads and {shared} "
                f"bytes of shared memory: {driver.CUresult(status).name}."
            )


@functools.cache
def _launcher() -> Callable[..., int]:
    """cuLaunchKernel as the driver has it; the bindings take longer to understand its arguments."""
    from cuda.bindings import driver

    address, found = _checked(driver.cuGetProcAddress(b"cuLaunchKernel", 12000, 0))
    assert address, found
    return ctypes.CFUNCTYPE(ctypes.c_int)(int(address))


def missing() -> str | None:
    """None if kernels can be compiled here, else what is missing and how to get it."""
    try:
        import cuda.core  # noqa: F401
    except ImportError as error:
        return f"cuda-core can't be imported ({error}); run `pip install cuda-core`."
    try:
        compiler_version()
    except (ImportError, RuntimeError, OSError) as error:
        return f"NVRTC can't be loaded ({error}); install a CUDA build of torch, or `pip install nvidia-cuda-nvrtc`."
    return None


@functools.cache
def compiler_version() -> tuple[int, int]:
    """Version of NVRTC, such as (13, 0)."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: {status.name}")
    return major, minor


@functools.cache
def known_architectures() -> tuple[int, ...]:
    """Architectures the installed NVRTC compiles for, such as (75, 80, ..., 120)."""
    from cuda.bindings import nvrtc

    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, architectures = nvrtc.nvrtcGetSupportedArchs()
    return tuple(int(a) for a in list(architectures)[:count])


@functools.cache
def field_names(header: str) -> tuple[str, ...]:
    """Names of the fields of the struct of arguments that a header of csrc/cuda defines, in order."""
    code = (source_dir() / "cuda" / header).read_text().split("struct ")[1].split("};")[0]
    lines = [line.split("//")[0].strip() for line in code.splitlines()]
    return tuple(line.rstrip(";").split()[-1] for line in lines if line.endswith(";"))


@functools.cache
def _sources() -> str:
    files = sorted((source_dir() / "cuda").glob("*.cuh"))
    return "".join(f"{file.name}\n{file.read_text()}" for file in files)


def cubin(wanted: Specialisation, architecture: int) -> bytes:
    """Machine code of a specialisation, from the cache if it is there."""
    key = repr((wanted, architecture, compiler_version(), _STANDARD, _sources()))
    entry = cache_dir() / f"{wanted.name}-sm{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    code = _read(entry)
    if code is None:
        _log.info("compiling %s for sm_%d; kept in %s", wanted.name, architecture, entry.parent)
        code, _ = compile_source(wanted, architecture)
        _write(entry, code)
    return code


def compile_source(wanted: Specialisation, architecture: int) -> tuple[bytes, str]:
    """Compile a specialisation, without the cache and without a GPU.

    Returns: machine code, and the assembler's report of registers and spills.
    Raises: RuntimeError with the compiler's log.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        std=_STANDARD,
        arch=f"sm_{architecture}",
        include_path=str(source_dir() / "cuda"),
        define_macro=list(wanted.macros),
        ptxas_options="-v",
    )
    log = io.StringIO()
    try:
        code = Program(f'#include "{wanted.name}.cuh"\n', "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # cuda-core's own type of it is private
        raise RuntimeError(f"vision_mamba: {wanted} does not compile for sm_{architecture}: {error}") from error
    return bytes(code), log.getvalue()


@functools.cache
def cache_dir() -> Path:
    """Where compiled kernels are kept: $VISION_MAMBA_CACHE, else the user's cache directory, else a temporary one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    place = Path(os.environ.get("VISION_MAMBA_CACHE") or os.path.join(home, "vision_mamba"))
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError as error:
        spare = Path(tempfile.mkdtemp(prefix="vision_mamba-"))
        _log.warning(
            "compiled kernels can't be kept in %s (%s) and go to %s for this run; set VISION_MAMBA_CACHE to a writable "
            "directory.", place, error.strerror, spare,
        )  # fmt: skip
        return spare


def _read(entry: Path) -> bytes | None:
    try:
        data = entry.read_bytes()
    except OSError:
        return None
    checksum, code = data[:_CHECKSUM], data[_CHECKSUM:]
    if hashlib.sha256(code).digest() != checksum:
        _log.warning("the cached kernel %s is damaged and is built again", entry)
        return None
    return code


def _write(entry: Path, code: bytes) -> None:
    """Write aside and rename, so that no other process ever reads half an entry."""
    name = None
    try:
        with tempfile.NamedTemporaryFile(dir=entry.parent, prefix=entry.stem, delete=False) as file:
            name = file.name
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(name, entry)
    except OSError as error:
        _log.warning("the compiled kernel %s can't be kept: %s", entry.name, error)
        if name is not None and os.path.exists(name):
            os.unlink(name)


@functools.cache
def kernel(wanted: Specialisation, device: int) -> Kernel:
    """The kernel loaded on a CUDA device, which must be the current one; at any time, also amid a capture."""
    major, minor = torch.cuda.get_device_capability(device)
    machine_code = cubin(wanted, 10 * major + minor)
    with relaxed():
        return _load(wanted, machine_code, device)


def _load(wanted: Specialisation, machine_code: bytes, device: int) -> Kernel:
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    _use_context(device)
    code = ObjectCode.from_cubin(machine_code, name=wanted.name)
    handle = driver.CUkernel(int(code.get_kernel(wanted.name).handle))
    _loaded.append(code)
    # Every source ends in these two numbers, so that they are defined where the kernel is.
    shape = array("i", [0, 0])
    address, size = _checked(driver.cuLibraryGetGlobal(driver.CUlibrary(int(code.handle)), b"launch_shape"))
    (stream,) = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))  # waits for nobody
    _checked(driver.cuMemcpyDtoHAsync(shape.buffer_info()[0], address, size, stream))
    _checked(driver.cuStreamSynchronize(stream))
    _checked(driver.cuStreamDestroy(stream))
    threads, shared = shape
    limit = shared if threads else shared_limit(device)
    if limit > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuKernelSetAttribute(attribute, limit, handle, driver.CUdevice(device)))
    return Kernel(int(handle), threads, shared)


def _use_context(device: int) -> None:
    """Make torch's context of a device current in this thread, if none is; unlike torch's ways to, without a wait."""
    from cuda.bindings import driver

    (current,) = _checked(driver.cuCtxGetCurrent())
    if not int(current):
        _checked(driver.cuCtxSetCurrent(_context(device)))


@functools.cache
def _context(device: int) -> Any:
    from cuda.bindings import driver

    torch.cuda.init()
    return _checked(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)))[0]


@functools.cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory a block can have on a device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


_loaded: list[object] = []  # machine code is unloaded with its object


def _checked(result: tuple) -> tuple:
    """What a driver call returned, beside its status. Raises RuntimeError if it failed."""
    if int(result[0]):
        raise RuntimeError(f"vision_mamba: a kernel could not be loaded: {result[0].name}.")
    return result[1:]
