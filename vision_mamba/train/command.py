"""How a command that trains ends: its exit status, and what it says then."""

from __future__ import annotations

import gc
import logging
import shlex
import sys
import traceback
from collections.abc import Callable

from vision_mamba.train.errors import Interrupted, TrainError
from vision_mamba.train.parallel import launcher, rank_by_environment

_log = logging.getLogger("vision_mamba.train")


def finished(run: Callable[[], object]) -> int:
    """Let a run go on to its end, and say how it ended if not as it should.

    Returns: the exit status: 0; that of a TrainError, 128 and the signal's number among them; 130 after Ctrl-C.
    """
    try:
        run()
    except BaseException as error:
        # The traceback's frames keep alive the loading processes, for which Python would wait at its end.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        if isinstance(error, Interrupted):
            if rank_by_environment() == 0:  # all processes are stopped together
                command = [*launcher(), sys.argv[0], "--resume", error.checkpoint]
                _log.warning("%s\ncontinue with: %s", error, shlex.join(command))
            return error.status
        if isinstance(error, TrainError):
            _log.error("error: %s", error)
            return error.status
        if isinstance(error, KeyboardInterrupt):
            _log.error("stopped before the first step, or a second time; what was saved before is untouched")
            return 130
        raise
    return 0
