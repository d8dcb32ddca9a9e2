"""Train an object detector on data in the format of COCO, on one device or by torchrun on several; --help shows how."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from rich.console import Console

from vision_mamba.detection.engine import Position
from vision_mamba.detection.options import READER, Config
from vision_mamba.detection.run import prepare, train
from vision_mamba.provenance import provenance
from vision_mamba.train import checkpoint
from vision_mamba.train import model as models
from vision_mamba.train.command import finished
from vision_mamba.train.errors import ConfigError, TrainError
from vision_mamba.train.parallel import World, world_on
from vision_mamba.train.progress import Progress, logging_to

COVERED = ("vision_mamba", "csrc", "configs", "tools/train_detection.py")  # what a result depends on, and the data


def main(argv: list[str]) -> int:
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        try:
            config = READER.parse(argv, checkpoint.options)
            world = stack.enter_context(world_on(models.device(config.device)))
            begin_from = _together(config, world)
        except TrainError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.status
        quiet = not world.primary
        file = None if quiet else config.run_dir / "train.log"
        stack.enter_context(logging_to(Console(quiet=True) if quiet else console, file))
        progress = Progress(Console(quiet=True) if quiet else console, config.log_interval)
        return finished(lambda: run(config, begin_from, progress, world))


def run(config: Config, begin_from: Path | None, progress: Progress, world: World) -> None:
    """Train, and say what came out."""
    result = train(config, begin_from, progress, world)
    if world.primary:
        report(config, result, world)


def _together(config: Config, world: World) -> Path | None:
    """Where all processes begin, as the first one finds it.

    Raises: ConfigError, in all of them.
    """
    found: Path | ConfigError | None = None
    if world.primary:
        try:
            found = prepare(config)
        except ConfigError as error:
            found = error
    found = world.told(found)
    if isinstance(found, ConfigError):
        raise found
    return found


def report(config: Config, result: Position, world: World) -> None:
    """Say the figures, and put them on record if that is asked for."""
    for name, value in result.measured.items():
        if value is not None:
            sys.stdout.write(f"{name} {value:.4f}\n")
    if config.record is None:
        return
    line = provenance(world.device, *COVERED) | {
        "case": config.run_dir.name,
        "model": config.model,
        "detector": config.detector,
        "processes": world.size,
        "epochs": config.epochs,
        "steps": result.steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        **result.measured,
        "seconds": round(result.seconds, 1),
    }
    with open(config.record, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
