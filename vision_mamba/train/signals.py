"""Stopping at the next step instead of in the middle of one."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

_log = logging.getLogger("vision_mamba.train")


class StopSignals(contextlib.AbstractContextManager):
    """Remember SIGINT and SIGTERM instead of dying of them; a second one acts as it usually does."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._remember)
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        _log.warning("%s: saving after this step (again to stop at once)", signal.Signals(signum).name)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def until_asked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; they end early where a signal ended the loading processes."""
        try:
            yield from batches
        except RuntimeError:  # the signal may have reached them as well
            if self.signum is None:
                raise
