"""What a run does when numbers are not finite, images cannot be read, or all that was learned is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.task import ClassificationTask

from tests.train import runs
from tests.train.runs import STEPS
from vision_mamba.train.checkpoint import LAST
from vision_mamba.train.errors import DataError, NonFiniteError
from vision_mamba.train.guards import collapsed

forward = ClassificationTask.forward


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The loss of these steps becomes NaN, and with it every gradient."""
    done = 0

    def spoiled(self: Any, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        result = forward(self, images, targets)
        return {**result, "loss": result["loss"] * float("nan")} if done in steps else result

    monkeypatch.setattr(ClassificationTask, "forward", spoiled)


def finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize("options", [{}, {"clip_grad": 1.0, "amp": True, "amp_dtype": "float16"}, {"model_ema": True}])
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    spoil(monkeypatch, 2, STEPS + 1)
    config = runs.config(drawn, **options)
    with caplog.at_level("WARNING", "vision_mamba.train"):
        result = runs.fit(config)
    assert result.left_out_before == 2 and finite(runs.weights(config.run_dir))
    assert "step 2 of epoch 1: the loss is nan, the norm of its gradient nan, at learning rate" in caplog.text
    assert "left out, 1 of at most 10 in this epoch" in caplog.text
    steps = torch.load(config.run_dir / LAST, weights_only=True)["optimizer"]["state"][0]["step"]
    assert steps == 2 * STEPS - 2, "the optimizer saw nothing of them"


def test_statistics_of_a_step_that_is_left_out_are_too(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = 0

    def spoiled(self: Any, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        return forward(self, images * float("nan") if done == 2 else images, targets)

    monkeypatch.setattr(ClassificationTask, "forward", spoiled)
    model = {"model": "test_efficientvmamba", "model_kwargs": {"dims": [8, 8, 8, 8]}}
    config = runs.config(drawn, epochs=1, **model)
    assert runs.fit(config).left_out_before == 1
    weights = runs.weights(config.run_dir)
    assert any(name.endswith("running_mean") for name in weights) and finite(weights)


def test_too_many_of_them_end_the_run_with_the_last_good_checkpoint_named(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, STEPS + 1, STEPS + 2)
    config = runs.config(drawn, max_bad_steps=1)
    told = (
        r"step 2 of epoch 2: the loss is nan, .*; 2 such steps in this epoch are more than --max-bad-steps 1; the state"
    )
    with pytest.raises(NonFiniteError, match=told) as caught:
        runs.fit(config)
    assert str(config.run_dir / LAST) in str(caught.value)
    saved = torch.load(config.run_dir / LAST, weights_only=True)
    assert (saved["epoch"], saved["batch"], saved["trained"]) == (1, 2, 0) and finite(saved["state_dict"])
    monkeypatch.undo()
    assert runs.fit(runs.config(drawn, resume="auto")).epoch == 2


def test_weights_that_are_damaged_are_not_saved(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = runs.config(drawn, max_bad_steps=0)

    def damaging(self: Any, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.nn.init.constant_(next(self.trainable_module.parameters()), float("nan"))
        return forward(self, images, targets)

    monkeypatch.setattr(ClassificationTask, "forward", damaging)
    with pytest.raises(
        NonFiniteError, match=r"the weights are damaged, so they are not saved; there is no checkpoint yet"
    ):
        runs.fit(config)
    assert not (config.run_dir / LAST).exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(self: Any, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.trainable_module(images)
        return {"loss": (output - output.detach()).abs().sqrt().sum(), "output": output}  # 0, with slope inf * 0

    monkeypatch.setattr(ClassificationTask, "forward", spoiled)
    config = runs.config(drawn, max_bad_steps=0)
    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 1: the loss is 0.0, the norm of its gradient nan"):
        runs.fit(config)
    assert finite(runs.weights(config.run_dir))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_go_bad_are_named_once_counted_and_replaced(
    drawn: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    left = drawn / "images" / "train" / "left"
    for name in ("0.png", "3.png"):
        (left / name).write_bytes((left / name).read_bytes()[:300])
    options: dict[str, Any] = {"check_images": False, "workers": workers, "batch_size": 2, "mixup": 0.0}
    with caplog.at_level("WARNING", "vision_mamba.train"):
        runs.fit(runs.config(drawn, skip_bad_images=2, **options))
    told = [message for message in caplog.messages if message.startswith("left out: image")]
    assert sorted(Path(line.split()[3]).name for line in told) == ["0.png", "3.png"], "each once, over two epochs"
    with pytest.raises(DataError, match=r"2 images cannot be read, more than --skip-bad-images 1:"):
        runs.fit(runs.config(drawn, skip_bad_images=1, experiment="strict", **options))


def test_losing_all_that_was_learned_is_told(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from timm.task import ClassificationEvaluator

    accuracies = iter([95.0, 51.0])
    compute = ClassificationEvaluator.compute

    def measured(self: Any, distributed: bool = False) -> dict[str, float]:
        return {**compute(self, distributed), "top1": next(accuracies)}

    monkeypatch.setattr(ClassificationEvaluator, "compute", measured)
    with caplog.at_level("ERROR", "vision_mamba.train"):
        runs.fit(runs.config(drawn))
    assert "held-out accuracy fell to 51.00 %, which is near chance, after 95.00 % in epoch 1" in caplog.text
    assert "best.pth" in caplog.text


@pytest.mark.parametrize(
    "accuracy, best, classes, lost",
    [(10, 90, 10, True), (17, 90, 10, True), (20, 90, 10, False), (10, None, 10, False), (0.1, 5, 1000, False)],
)
def test_what_counts_as_lost(accuracy: float, best: float | None, classes: int, lost: bool) -> None:
    assert collapsed(accuracy, best, classes) == lost
