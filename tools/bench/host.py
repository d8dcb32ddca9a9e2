"""Where an eager call spends the CPU's time until its kernels are queued, and put it on record.

    python tools/bench/host.py --out results/host.jsonl

Microseconds of one forward call by the backend `cuda`, without gradients, of a kind that was seen before: of the public
function, which finds such calls past torch's dispatcher; of the operator in all, and in parts, found by calling the
parts alone and with launches that do nothing. The median of batches of calls, each short enough for the device's queue.
A call with gradients, and forward and backward together, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from bench.cases import CASES, make_call  # noqa: E402
from bench.run import MEASURED  # noqa: E402
from vision_mamba import ops  # noqa: E402
from vision_mamba.ops.autograd import operator  # noqa: E402
from vision_mamba.ops.backends import forward_cuda, nvrtc  # noqa: E402
from vision_mamba.ops.call import GRADIENTS, ScanCall  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402

CALLS, BATCHES = 40, 60


def microseconds(work: Callable[[], Any]) -> float:
    times = list[float]()
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(CALLS):
            work()
        times.append((time.perf_counter() - begun) / CALLS * 1e6)
    return statistics.median(times)


def _forget() -> None:
    operator.known.clear()
    forward_cuda.runners.clear()


@torch.no_grad()
def parts(call: ScanCall) -> dict[str, float]:
    """The whole, and what adds up to it."""

    def run() -> float:
        """What is left when the call is recognised: making tensors and launching."""
        operator._autograd_run(*call)  # all arguments: the dispatcher would leave out those at their defaults
        found = operator.known.find(tuple(call), False, operator._covered(tuple(call)))
        assert found is not None, "a call of a kind that is looked at anew each time"
        seen, addresses = found
        return microseconds(lambda: seen.run(list(addresses)))

    _forget()
    options = call._asdict()
    for name in ("initial_state", "return_last_state"):
        assert not options.pop(name), "a call of the public function has none"
    public = microseconds(lambda: ops.cross_selective_scan(**options))
    whole = microseconds(lambda: operator.run_op(*call))
    kernel = microseconds(lambda: operator._autograd_run(*call))
    seen = microseconds(lambda: operator._seen(tuple(call), False))
    launched = run()
    launches = []
    with mock.patch.object(nvrtc.Bound, "launch", lambda self, stream: launches.append(self)):
        _forget()
        operator._autograd_run(*call)  # prepares the kind of call, and then runs it
        launches.clear()
        operator._autograd_run(*call)
        count = len(launches)
        silent = run()
    _forget()
    return dict(
        public=public, forward=whole, dispatcher=whole - kernel, modes=kernel - seen, recognition=seen - launched,
        tensors=silent, launches=launched - silent, kernels=count,
    )  # fmt: skip


def with_gradients(call: ScanCall) -> dict[str, float]:
    leaves = {n: t.detach().requires_grad_() for n in GRADIENTS if (t := getattr(call, n)) is not None}
    call = call._replace(**leaves)
    y, _ = operator.run_op(*call)
    dy = torch.randn_like(y)

    def both() -> None:
        torch.autograd.grad(operator.run_op(*call)[0], list(leaves.values()), dy)

    return dict(forward_with_gradients=microseconds(lambda: operator.run_op(*call)), both=microseconds(both))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", default="vmamba_t_stage1_b1,vmamba_t_stage4_b1,vmamba_t_stage2_b128,vim_s_b1,vim_s_b128"
    )
    parser.add_argument("--out", type=Path, help="append the records to this file, one JSON line a case")
    chosen = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    source = provenance(device, *MEASURED)
    for name in chosen.case.split(","):
        case = CASES[name]
        call = make_call(case, torch.bfloat16, device)
        found = {key: round(value, 2) for key, value in (parts(call) | with_gradients(call)).items()}
        what = dict(case=name, backend="cuda", shape=case.shape(), dtype="bfloat16", microseconds=found)
        sys.stdout.write(f"{name}: {found}\n")
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            with chosen.out.open("a") as file:
                file.write(json.dumps(source | what) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
