"""What can go wrong in a way that the user mends: the tools show these messages without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrainError(Exception):
    """The message says where, the rule, what was found and the way out."""


class ConfigError(TrainError):
    """An option is unknown, of the wrong type or impossible."""


class DataError(TrainError):
    """The images cannot be trained on or predicted as they are."""


class CheckpointError(TrainError):
    """A checkpoint cannot be read, does not fit the model, or cannot be written."""


class NonFiniteError(TrainError):
    """The loss or its gradient became inf or NaN."""


class Interrupted(TrainError):
    """A signal asked the run to stop; everything up to the last step is in `checkpoint`."""

    def __init__(self, signum: int, checkpoint: str) -> None:
        super().__init__(f"stopped by signal {signum}; the run is saved in {checkpoint}")
        self.signum, self.checkpoint = signum, checkpoint


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like `name`."""
    known = list(known)
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def shortened(names: Iterable[object], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    listed = [str(name) for name in names]
    more = f", ... and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
