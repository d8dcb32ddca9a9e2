"""Linear time-invariant state spaces, from the differential equation to a layer: what selective scans grew out of.

`docs/state_spaces.md` walks through it, in an installed package `state_spaces.md` beside this file; every function is
tested to equal its neighbour.
"""

from vision_mamba.ssm.discretize import discretize
from vision_mamba.ssm.hippo import DIAGONALS, NormalPlusLowRank, diagonal, hippo_legs, nplr_legs
from vision_mamba.ssm.s4d import S4D
from vision_mamba.ssm.scans import (
    SCANS,
    associative_scan,
    chunked_scan,
    cumulative_sum_scan,
    segment_sum,
    sequential_scan,
)
from vision_mamba.ssm.system import convolve, fft_convolve, kernel, powers, recurrence, scan, vandermonde_kernel

__all__ = [
    "DIAGONALS",
    "S4D",
    "SCANS",
    "NormalPlusLowRank",
    "associative_scan",
    "chunked_scan",
    "convolve",
    "cumulative_sum_scan",
    "diagonal",
    "discretize",
    "fft_convolve",
    "hippo_legs",
    "kernel",
    "nplr_legs",
    "powers",
    "recurrence",
    "scan",
    "segment_sum",
    "sequential_scan",
    "vandermonde_kernel",
]
