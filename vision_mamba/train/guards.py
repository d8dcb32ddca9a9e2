"""What a run watches itself for: numbers that are not finite, images that cannot be read, learning that is undone."""

from __future__ import annotations

import logging
import math

from vision_mamba.train.bad_images import BadImages
from vision_mamba.train.errors import DataError, NonFiniteError

_log = logging.getLogger("vision_mamba.train")


class FiniteGuard:
    """Has steps left out whose loss or gradient is not finite, and ends the run after too many in one epoch.

    Args:
        limit: steps of an epoch that may be left out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def passes(self, loss: float, norm: float, overflows: bool) -> bool:
        """Whether a step may change the weights; `overflows` says that the loss scaler sees to the gradient."""
        return math.isfinite(loss) and (math.isfinite(norm) or overflows)

    def tell(self, step: str, loss: float, norm: float, lr: float, left_out: int, good: str) -> None:
        """Say that a step was left out, the last of `left_out` in this epoch.

        Args:
            good: what is known of the last good checkpoint.

        Raises: NonFiniteError after too many.
        """
        what = f"{step}: the loss is {loss}, the norm of its gradient {norm}, at learning rate {lr:.3e}"
        if left_out <= self.limit:
            _log.warning("%s; left out, %d of at most %d in this epoch", what, left_out, self.limit)
            return
        raise NonFiniteError(
            f"{what}; {left_out} such steps in this epoch are more than --max-bad-steps {self.limit}; {good}. Lower "
            "--lr, limit the gradient with --clip-grad 1, or try --no-amp; then go on from there, or begin again."
        )


class ImageGuard:
    """Names images that cannot be read as they are met, and ends the run after too many."""

    def __init__(self, limit: int, *sources: BadImages) -> None:
        self.limit, self.sources = limit, sources

    def look(self) -> int:
        """Name those that are new; returns how many there were so far, in this process."""
        for reason in (reason for bad in self.sources for reason in bad.new()):
            _log.warning("left out: %s", reason)
        return sum(len(bad.reasons) for bad in self.sources)

    def judge(self, count: int) -> None:
        """Raises: DataError if the processes met more than may be left out."""
        if count <= self.limit:
            return
        reasons = [reason for bad in self.sources for reason in bad.reasons]
        listed = "".join(f"\n  {reason}" for reason in reasons[:10])
        raise DataError(
            f"{count:,} images cannot be read, more than --skip-bad-images {self.limit}:{listed}\n"
            "Replace or remove them, or raise that number; training with --check-images looks at all of them first."
        )


def collapsed(accuracy: float, best: float | None, classes: int) -> bool:
    """Whether a model that had learned is back to guessing: a tenth of what it had gained over chance is left.

    >>> collapsed(0.1, 70.0, 1000), collapsed(69.0, 70.0, 1000), collapsed(0.1, 0.3, 1000)
    (True, False, False)
    """
    chance = 100 / max(classes, 1)
    learned = best is not None and best - chance > 0.1 * (100 - chance)
    return learned and accuracy - chance < 0.1 * (best - chance)  # type: ignore[operator]
