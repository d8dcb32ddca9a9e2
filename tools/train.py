"""Train an image classifier on class folders or on the handwritten digits; --help shows how."""

from __future__ import annotations

import shlex
import sys

from rich.console import Console

from vision_mamba.train import checkpoint
from vision_mamba.train.config import parse
from vision_mamba.train.errors import ConfigError, Interrupted, TrainError
from vision_mamba.train.progress import Progress, logging_to
from vision_mamba.train.run import prepare, train


def main(argv: list[str]) -> int:
    console = Console(stderr=True)
    try:
        config = parse(argv, checkpoint.options)
        begin_from = prepare(config)
        with logging_to(console, config.run_dir / "train.log"):
            result = train(config, begin_from, Progress(console, config.log_interval))
    except Interrupted as stopped:
        command = shlex.join(["python", sys.argv[0], "--resume", stopped.checkpoint])
        sys.stderr.write(f"{stopped}\ncontinue with: {command}\n")
        return 128 + stopped.signum
    except TrainError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    sys.stdout.write(f"{config.model} held-out accuracy {result.metric:.2f} %\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
