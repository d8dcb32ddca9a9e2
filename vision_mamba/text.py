"""Words that people type and read: the known name that was probably meant, long lists cut short, values of flags."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like `name`.

    >>> nearest("epchs", ["batch_size", "epochs"])
    'epochs'
    """
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def shortened(names: Iterable[object], limit: int = 5) -> str:
    """The first few of a list, and how many more there are.

    >>> shortened(range(10), 3)
    '0, 1, 2, ... and 7 more'
    """
    listed = [str(name) for name in names]
    more = f", ... and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def positive(text: str) -> int:
    """The value of a flag that takes a whole number of at least 1, as argparse's `type`.

    >>> positive("12")
    12
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """The same for a whole number that may be 0.

    >>> natural("0")
    0
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def destination(text: str) -> str:
    """The value of a flag that names a file to write, as argparse's `type`: its folder is made if there is none.

    Found out before the work is done whose result it is for.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from error
    return text
