"""Random numbers as a function of where a run stands, so that no generator's state has to be carried along."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_step(*key: int) -> None:
    """Set every random number generator by a key, such as (seed, process, epoch, batch)."""
    torch_ = _seed_cpu(*key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch_)


def _seed_cpu(*key: int) -> int:
    python, numpy, torch_ = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.random.default_generator.manual_seed(torch_)
    return torch_


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw random numbers on the CPU as a function of the key alone; outside, nothing is drawn."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(*key)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if wanted, torch takes algorithms that repeat to the last bit; what has none raises RuntimeError."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it, before its first product
    how: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), how.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    how.fill_uninitialized_memory = False  # for debugging, and slow
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        how.fill_uninitialized_memory = before[1]
