"""The figures of every epoch: a CSV file, and on request TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

from timm.utils import trim_summary, update_summary

from vision_mamba.train.errors import ConfigError
from vision_mamba.train.options import Config

_log = logging.getLogger("vision_mamba.train")
SUMMARY = "summary.csv"


class Journal:
    """Where the figures of a run go; nowhere, in all processes but the first.

    Raises: ConfigError if a package that was asked for is missing.
    """

    def __init__(self, config: Config, writes: bool) -> None:
        self.summary = config.run_dir / SUMMARY
        self.writes = writes
        self._board: Any = None
        self._wandb: Any = None
        if writes and config.log_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(f"--log-tensorboard: {error}; pip install tensorboard") from error
            self._board = SummaryWriter(str(config.run_dir / "tensorboard"))
        if writes and config.log_wandb:
            try:
                import wandb
            except ImportError as error:
                raise ConfigError("--log-wandb: the package is missing; pip install wandb") from error
            self._wandb = wandb.init(
                project=config.wandb_project, name=config.run_dir.name, config=config.plain(), resume="allow",
                id=config.run_dir.name,
            )  # fmt: skip

    def begin(self, epoch: int) -> None:
        """Forget epochs that will be done again."""
        if self.writes:
            trim_summary(str(self.summary), epoch)

    def epoch(self, epoch: int, training: dict[str, float | None], held_out: dict[str, float], lr: float) -> None:
        """Write down an epoch. A disk that is full costs the row, not the run."""
        if not self.writes:
            return
        figures = {f"train_{name}": value for name, value in training.items() if value is not None}
        figures |= {f"eval_{name}": value for name, value in held_out.items()} | {"lr": lr}
        try:
            update_summary(epoch, training, held_out, str(self.summary), lr=lr)
            if self._board is not None:
                for name, value in figures.items():
                    self._board.add_scalar(name, value, epoch)
                self._board.flush()
        except OSError as error:
            _log.error("%s: epoch %d could not be written down: %s", self.summary, epoch, error.strerror or error)
        if self._wandb is not None:
            self._wandb.log(figures, step=epoch)


def rows(run_dir: Path) -> list[dict[str, float]]:
    """What was written down of a run, an epoch a row."""
    path = run_dir / SUMMARY
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
