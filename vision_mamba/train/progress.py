"""What one sees of a run: a bar on a terminal, lines elsewhere, and the same log in a file."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

_log = logging.getLogger("vision_mamba.train")


class Bar(Protocol):
    def advance(self, items: int, steps: int = 1, **figures: float) -> None:
        """Further steps are done, on so many items; the figures are shown as they come."""


class _Drawn:
    def __init__(self, bar: RichProgress, total: int, done: int, label: str) -> None:
        self.bar, self.started, self.items = bar, time.perf_counter(), 0
        self.task = bar.add_task(label, total=total, completed=done, figures="")

    def advance(self, items: int, steps: int = 1, **figures: float) -> None:
        self.items += items
        self.bar.update(self.task, advance=steps, figures=_figures(self.items, self.started, figures))


class _Written:
    def __init__(self, total: int, done: int, label: str, every: int) -> None:
        self.total, self.begun, self.done, self.label, self.every = total, done, done, label, every
        self.started, self.items = time.perf_counter(), 0

    def advance(self, items: int, steps: int = 1, **figures: float) -> None:
        self.items += items
        before, self.done = self.done, self.done + steps
        if before // self.every < self.done // self.every and self.done < self.total:
            elapsed = time.perf_counter() - self.started
            left = timedelta(seconds=round(elapsed * (self.total - self.done) / (self.done - self.begun)))
            told = _figures(self.items, self.started, figures)
            _log.info("%s %d/%d %s, %s left", self.label, self.done, self.total, told, left)


def _figures(items: int, started: float, figures: dict[str, float]) -> str:
    shown = [f"{name} {value:.4g}" for name, value in figures.items()]
    shown.append(f"{items / max(time.perf_counter() - started, 1e-9):,.0f} images/s")
    if torch.cuda.is_initialized():
        shown.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return " ".join(shown)


class Progress:
    """Draws on a terminal, writes a line every `log_interval` steps where there is none.

    Args:
        console: of rich; its stream decides.
    """

    def __init__(self, console: Console, log_interval: int = 50) -> None:
        self.console, self.log_interval = console, log_interval

    @contextlib.contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar that lives as long as the block."""
        if not self.console.is_terminal:
            yield _Written(total, done, label, self.log_interval)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        with RichProgress(*columns, console=self.console, transient=True) as drawn:
            yield _Drawn(drawn, total, done, label)


class _ToConsole(logging.Handler):
    """Lines above the bar, as they are: a command must stay on one line to be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def logging_to(console: Console, file: Path | None = None, level: int = logging.INFO, mark: str = "") -> Iterator[None]:
    """Send the package's log to the console and, as plain lines with dates, to a file, until the block ends.

    Args:
        mark: what lines on the console begin with, to tell several processes apart.
    """
    root = logging.getLogger("vision_mamba")
    handlers: list[logging.Handler] = [_ToConsole(console)]
    handlers[0].setFormatter(logging.Formatter(f"{mark}%(message)s"))
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = root.level
    root.setLevel(level)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
