"""What is said of images that cannot be read: before training, and while it runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vision_mamba.train.errors import DataError

if TYPE_CHECKING:
    from vision_mamba.train.images import ImageSet


class BadImages:
    """Unreadable images, told by the processes that load to the one that trains."""

    def __init__(self) -> None:
        self._told: Any = multiprocessing.SimpleQueue()
        self.reasons: list[str] = []

    def tell(self, reason: str) -> None:
        self._told.put(reason)

    def new(self) -> list[str]:
        """Those that were told since the last call, each once; `reasons` keeps them all."""
        found = []
        while not self._told.empty():
            reason = self._told.get()
            if reason not in self.reasons:
                self.reasons.append(reason)
                found.append(reason)
        return found


def unreadable(images: ImageSet, threads: int, seen: Callable[[], object] = lambda: None) -> dict[int, str]:
    """Decode every image; index -> why, of those that fail.

    Args:
        seen: called after each image, to move a progress bar.
    """

    def reason(index: int) -> str | None:
        try:
            images.image(index)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        reasons = {}
        for index, why in enumerate(pool.map(reason, range(len(images)))):
            seen()
            if why is not None:
                reasons[index] = why
        return reasons


def without_unreadable(
    images: ImageSet, reasons: dict[int, str], limit: int, warn: Callable[[str], object]
) -> ImageSet:
    """The images less the unreadable ones, each of which is told to `warn`.

    Raises: DataError that counts and names them if they are more than `limit`, or if none is left.
    """
    if not reasons:
        return images
    if len(reasons) > limit:
        listed = "\n  ".join(list(reasons.values())[:10])
        more = f"\n  ... and {len(reasons) - 10:,} more" if len(reasons) > 10 else ""
        raise DataError(
            f"{len(reasons):,} of {len(images):,} images cannot be read:\n  {listed}{more}\n"
            f"Replace or remove them, or leave them out with --skip-bad-images {len(reasons)}."
        )
    for why in reasons.values():
        warn(f"left out: {why}")
    if len(reasons) == len(images):
        raise DataError(f"none of the {len(images):,} images can be read; see the log for each.")
    return images.only([index for index in range(len(images)) if index not in reasons])
