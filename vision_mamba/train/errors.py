"""What can go wrong in a way that the user mends: the tools show these messages without a traceback."""

from __future__ import annotations


class TrainError(Exception):
    """The message says where, the rule, what was found and the way out; `status` is what a tool exits with."""

    status = 1


class ConfigError(TrainError):
    """An option is unknown, of the wrong type or impossible."""

    status = 2


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
        self.signum, self.checkpoint, self.status = signum, checkpoint, 128 + signum
