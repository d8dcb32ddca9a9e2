"""Train an image classifier on class folders, on the handwritten digits or on what timm reads; --help shows how."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import record

from vision_mamba.train import checkpoint
from vision_mamba.train.checkpoint import BEST, LAST
from vision_mamba.train.command import finished
from vision_mamba.train.engine import Position
from vision_mamba.train.errors import TrainError
from vision_mamba.train.journal import SUMMARY, rows
from vision_mamba.train.options import READER, Config
from vision_mamba.train.parallel import launcher, rank_by_environment
from vision_mamba.train.progress import Progress, logging_to
from vision_mamba.train.run import prepare, train

_log = logging.getLogger("vision_mamba.train")
CURVES = "curves.png"


def main(argv: list[str]) -> int:
    console = Console(stderr=True)
    rank = rank_by_environment()
    try:
        config = READER.parse(argv, checkpoint.options)
        begin_from = prepare(config)
    except TrainError as error:
        if rank == 0:  # all processes find the same
            sys.stderr.write(f"error: {error}\n")
        return error.status
    log = None if config.dry_run or rank else config.run_dir / "train.log"
    level, mark = (logging.WARNING, f"process {rank}: ") if rank else (logging.INFO, "")
    with logging_to(console, log, level, mark):
        return finished(lambda: run(config, begin_from, console, rank == 0 and not config.dry_run))


def run(config: Config, begin_from: Path | None, console: Console, concluding: bool) -> None:
    """Train, and say what came out if `concluding`."""
    result = train(config, begin_from, Progress(console, config.log_interval))
    if concluding:
        conclude(config, result, console)
        sys.stdout.write(f"{config.model} held-out accuracy {result.metric:.2f} %\n")


def conclude(config: Config, result: Position, console: Console) -> None:
    """Draw the curves of a finished run, and say what came out and what to do with it."""
    run_dir = config.run_dir
    found = [name for name in (LAST, BEST, SUMMARY) if (run_dir / name).exists()]
    figures = rows(run_dir)
    try:
        from vision_mamba.viz.curves import draw_curves
    except ImportError:
        _log.info("no curves are drawn, for matplotlib is missing: pip install matplotlib")
    else:
        draw_curves(figures, run_dir / CURVES)
        found.append(CURVES)
    table = Table(title=f"{config.model}, {result.epoch} epochs", title_justify="left", show_header=False)
    table.add_row(
        "held-out accuracy", f"{result.metric:.2f} % (best {result.best_metric:.2f} %, epoch {result.best_epoch})"
    )
    if figures:
        table.add_row("loss", f"{figures[-1]['train_loss']:.4f} trained, {figures[-1]['eval_loss']:.4f} held out")
    table.add_row("time", f"{result.seconds:,.0f} s")
    table.add_row("steps left out", f"{result.left_out_before:,}, for they were not finite")
    table.add_row("files", f"{run_dir}/: {', '.join(found)}")
    console.print(table)
    validate = ["python", "tools/validate.py", "--checkpoint", str(run_dir / BEST), *held_out(config)]
    longer = [*launcher(), sys.argv[0], "--resume", str(run_dir / LAST), "--epochs", str(2 * config.epochs)]
    _log.info("validate with: %s\ntrain longer with: %s", shlex.join(validate), shlex.join(longer))


def held_out(config: Config) -> list[str]:
    """The words that name the held-out images of a run to tools/validate.py."""
    if config.dataset == "digits":
        return ["--digits"]
    names = ("dataset", "data_dir", "val_split", "class_map")
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(Config(), name)}
    return [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", value)]


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
