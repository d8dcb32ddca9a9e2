"""What every test can rely on: repeatable random numbers, and outputs that start as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vision_mamba import ops


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu are deselected where there is no accelerator; those of extras skip themselves without them."""
    if torch.accelerator.is_available():
        return
    without = [item for item in items if item.get_closest_marker("gpu")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def chosen_by_the_library() -> Iterator[None]:
    """A test that sets a backend for good does not set it for the next one."""
    ops.use_backend(None)
    yield
    ops.use_backend(None)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN, so that an element nobody wrote is found."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For training what is so small that sharing it between threads costs more than computing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
