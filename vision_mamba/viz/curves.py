"""Loss and accuracy of a training run over its epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

LOSSES = {"train_loss": "trained on, as augmented", "eval_loss": "held out"}
ACCURACIES = {"eval_top1": "first guess", "eval_top5": "first five"}


def draw_curves(rows: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw loss and accuracy, and the learning rate thin behind the loss.

    Args:
        rows: an epoch each, with some of epoch, train_loss, eval_loss, eval_top1, eval_top5 and lr.
        path: of the picture; its ending says the format.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    epochs = [row["epoch"] + 1 for row in rows]
    for axis, title, lines in zip(axes, ("loss", "held-out accuracy, %"), (LOSSES, ACCURACIES), strict=True):
        for name, label in lines.items():
            if all(name in row for row in rows):
                axis.plot(epochs, [row[name] for row in rows], label=label, marker="o" if len(rows) < 40 else "")
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    rates = axes[0].twinx()
    rates.plot(epochs, [row["lr"] for row in rows], color="0.7", linewidth=1)
    rates.set_ylabel("learning rate", color="0.5")
    figure.savefig(path, dpi=110)
