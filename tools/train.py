"""Train an image classifier on class folders or on the handwritten digits; --help shows how."""

from __future__ import annotations

import logging
import shlex
import sys

from rich.console import Console

from vision_mamba.train import checkpoint
from vision_mamba.train.config import parse
from vision_mamba.train.errors import ConfigError, Interrupted, TrainError
from vision_mamba.train.progress import Progress, logging_to
from vision_mamba.train.run import prepare, train

_log = logging.getLogger("vision_mamba.train")


def main(argv: list[str]) -> int:
    console = Console(stderr=True)
    try:
        config = parse(argv, checkpoint.options)
        begin_from = prepare(config)
    except TrainError as error:
        sys.stderr.write(f"error: {error}\n")
        return status_of(error)
    with logging_to(console, config.run_dir / "train.log"):
        try:
            result = train(config, begin_from, Progress(console, config.log_interval))
        except Interrupted as stopped:
            command = ["python", sys.argv[0], "--resume", stopped.checkpoint]
            _log.warning("%s\ncontinue with: %s", stopped, shlex.join(command))
            return status_of(stopped)
        except TrainError as error:
            _log.error("error: %s", error)
            return status_of(error)
        except KeyboardInterrupt:
            _log.error("stopped before the first step, or a second time; what was saved before is untouched")
            return 130
    sys.stdout.write(f"{config.model} held-out accuracy {result.metric:.2f} %\n")
    return 0


def status_of(error: TrainError) -> int:
    """The exit status that --help promises."""
    if isinstance(error, Interrupted):
        return 128 + error.signum
    return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
