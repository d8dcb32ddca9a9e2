"""Run-time compilation of csrc/cuda: NVRTC through NVIDIA's cuda-core, a cache on disk, and launches in microseconds.

A kernel is a source file and its macros. Its machine code is kept under a name that holds a hash of all sources, the
flags, the architecture and the compiler's version, so that nothing stale is ever found. Entries are written aside and
renamed, which makes processes that race harmless; an entry that does not match its own checksum is built again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib
import io
import logging
import os
import secrets
import shutil
import tempfile
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from vision_mamba.constants import relaxed
from vision_mamba.ops.backends.sources import source_dir

_log = logging.getLogger("vision_mamba")

PORTABLE = 8  # blocks of a cluster, where there are any
OLDEST = (7, 0)  # compute capability: independent thread scheduling, which the exchanges between lanes rely on
_STANDARD = "c++17"
_CHECKSUM = hashlib.sha256().digest_size
_importing = threading.Lock()


class Specialisation(NamedTuple):
    """One kernel to compile: the source `<name>.cuh` of csrc/cuda, whose entry point has that name, and its macros."""

    name: str
    macros: tuple[tuple[str, str], ...]


class Kernel(NamedTuple):
    """A compiled kernel on one device."""

    handle: int
    threads: int  # of a block; 0 = chosen at each launch
    shared: int  # bytes of dynamic shared memory a block takes at least
    joined: int = 1  # blocks of a cluster

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

    def runs(self, threads: int, more_shared: int) -> bool:
        """Whether the device has room for a cluster: one of more blocks than it promises may find none."""
        from cuda.bindings import driver

        if self.joined <= PORTABLE:
            return True
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = self.joined, 1, 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.joined, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads or self.threads, 1, 1
        config.sharedMemBytes, config.attrs, config.numAttrs = self.shared + more_shared, [cluster], 1
        (count,) = _checked(driver.cuOccupancyMaxActiveClusters(driver.CUfunction(self.handle), config))
        return int(count) > 0


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


def _core() -> ModuleType:
    """cuda-core. Its package takes its own place while it is imported, and a second thread would find half of it."""
    with _importing:
        return importlib.import_module("cuda.core")


def missing() -> str | None:
    """None if kernels can be compiled here, else what is missing and how to get it."""
    try:
        _core()
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
    core = _core()
    options = core.ProgramOptions(
        std=_STANDARD,
        arch=f"sm_{architecture}",
        include_path=str(source_dir() / "cuda"),
        define_macro=list(wanted.macros),
        ptxas_options="-v",
    )
    log = io.StringIO()
    try:
        code = core.Program(f'#include "{wanted.name}.cuh"\n', "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # cuda-core's own type of it is private
        raise RuntimeError(f"vision_mamba: {wanted} does not compile for sm_{architecture}: {error}") from error
    return bytes(code), log.getvalue()


@functools.cache
def cache_dir() -> Path:
    """Where compiled kernels are kept; a temporary directory of this process where they can't be."""
    place, obstacle = cache_wanted()
    if obstacle is None:
        return place
    spare = Path(tempfile.mkdtemp(prefix="vision_mamba-"))
    atexit.register(shutil.rmtree, spare, ignore_errors=True)
    _log.warning("%s They go to %s for this run.", obstacle, spare)
    return spare


def cache_wanted() -> tuple[Path, str | None]:
    """Where compiled kernels should be kept, $VISION_MAMBA_CACHE or else the user's cache directory; and None, or why
    they can't be, with the way out."""
    named, of_caches = os.environ.get("VISION_MAMBA_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(of_caches):  # to be passed over then
        of_caches = os.path.join("~", ".cache")
    place = Path(os.path.expanduser(named or os.path.join(of_caches, "vision_mamba")))
    try:
        if not named and not place.is_absolute():
            raise OSError(errno.ENOENT, "this user has no home directory")
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return place, None
    except OSError as error:
        return place, (
            f"compiled kernels can't be kept in {place} ({error.strerror}); set VISION_MAMBA_CACHE to a writable "
            f"directory."
        )


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
    aside = entry.with_suffix(f".{secrets.token_hex(8)}")
    try:
        with open(aside, "xb") as file:  # as readable for others as the user has new files
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(aside, entry)
    except OSError as error:
        _log.warning("the compiled kernel %s can't be kept: %s", entry.name, error)
        with contextlib.suppress(OSError):
            aside.unlink()


@functools.cache
def kernel(wanted: Specialisation, device: int) -> Kernel:
    """The kernel loaded on a CUDA device, which must be the current one; at any time, also amid a capture."""
    major, minor = torch.cuda.get_device_capability(device)
    machine_code = cubin(wanted, 10 * major + minor)
    with relaxed():
        return _load(wanted, machine_code, device)


def _load(wanted: Specialisation, machine_code: bytes, device: int) -> Kernel:
    from cuda.bindings import driver

    _use_context(device)
    code = _core().ObjectCode.from_cubin(machine_code, name=wanted.name)
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
    macros = dict(wanted.macros)
    joined = int(macros.get("CLUSTER", 1)) * int(macros.get("TOGETHER", 1))
    if joined > PORTABLE:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _checked(driver.cuKernelSetAttribute(attribute, 1, handle, driver.CUdevice(device)))
    return Kernel(int(handle), threads, shared, joined)


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
