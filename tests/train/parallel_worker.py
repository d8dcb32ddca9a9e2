"""One process of a parallel run, for the tests: tools/train.py, with a fault on request.

FAULT="rank step" raises in that process at that step; with FAULT_KIND=kill the process is killed there instead.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from tools import train
from vision_mamba.train.learner import Learner

gradients = Learner.gradients


def faulty(self: Learner, group: Any, epoch: int, batch: int) -> torch.Tensor:
    rank, step = map(int, os.environ["FAULT"].split())
    if self.world.rank == rank and batch == step:
        if os.environ.get("FAULT_KIND") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("a fault on purpose")
    return gradients(self, group, epoch, batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "FAULT" in os.environ:
        Learner.gradients = faulty  # type: ignore[method-assign]
    sys.exit(train.main(sys.argv[1:]))
