"""The stopwatch: times and peak memory on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CYCLES_PER_MS = 2_000_000  # of a GPU's clock, at the most


class Stopwatch:
    """Times a call on a device, and says what memory it took at its peak beyond what stood before."""

    def __init__(self, device: torch.device, seconds: float, least: int = 4, most: int = 300) -> None:
        self.device, self.seconds, self.least, self.most = device, seconds, least, most
        self.cuda = device.type == "cuda"
        self.host_ms = 0.0  # what the CPU needed to queue the last call on a GPU

    def _once(self, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> float:
        """Milliseconds of work(prepare()), without prepare."""
        prepared = prepare()
        if not self.cuda:
            begun = time.perf_counter()
            work(prepared)
            return (time.perf_counter() - begun) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The device waits while the CPU queues, twice as long as that took the last time: launches are not timed.
        torch.cuda._sleep(200_000 + int(min(2 * self.host_ms, 5.0) * _CYCLES_PER_MS))
        start.record()
        begun = time.perf_counter()
        work(prepared)
        self.host_ms = (time.perf_counter() - begun) * 1e3
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def time(self, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> list[float]:
        """[p20, p50, p80] of as many runs as fit the time, after a warm-up."""
        until = time.perf_counter() + self.seconds
        for _ in range(3):
            self._once(prepare, work)
            if time.perf_counter() > until:
                break
        until, times, host = time.perf_counter() + self.seconds, list[float](), list[float]()
        while len(times) < self.least or (time.perf_counter() < until and len(times) < self.most):
            times.append(self._once(prepare, work))
            host.append(self.host_ms)
        self.host_ms = statistics.median(host)
        times.sort()
        return [round(times[min(len(times) - 1, int(len(times) * q))], 4) for q in (0.2, 0.5, 0.8)]

    def peak_mib(self, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> float | None:
        """MiB; None where the system does not tell."""
        gc.collect()
        _return_free_memory()
        prepared = prepare()
        if self.cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            kept = work(prepared)
            peak = torch.cuda.max_memory_allocated() - before
        elif (clear := Path("/proc/self/clear_refs")).exists():
            clear.write_text("5")  # forgets the peak so far
            before = _resident("VmRSS")
            kept = work(prepared)
            peak = _resident("VmHWM") - before
        else:
            return None
        del kept
        return round(peak / 2**20, 2)


def _return_free_memory() -> None:
    """Give the pages that the allocator keeps for later back to the system, so that their reuse is seen as growth."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc has it


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
