"""The two command lines from end to end: training on the digits, and predicting."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.train import runs
from tools import predict, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on drawn images."""
    folder = tmp_path_factory.mktemp("trained")
    runs.draw(folder / "images")
    runs.fit(runs.config(folder, epochs=1))
    return folder


def run(capsys: pytest.CaptureFixture[str], tool: object, *words: object) -> tuple[int, str, str]:
    status = tool.main([str(word) for word in words])  # type: ignore[attr-defined]
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.mark.parametrize("name", ["vmamba", "vim"])
def test_the_digits_are_learned_from_the_first_epoch(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    config = runs.ROOT / "configs" / "digits" / f"{name}.yaml"
    flags = ("--config", config, "--epochs", 1, "--warmup-epochs", 0.2, "--output", tmp_path, "--device", "cpu")
    status, out, _ = run(capsys, train, *flags)
    accuracy = re.fullmatch(rf"test_{name} held-out accuracy (\d+\.\d\d) %\n", out)
    assert status == 0 and accuracy is not None, out
    assert float(accuracy[1]) > 25, "chance is 10 %"
    run_dir = tmp_path / f"digits_{name}"
    assert {"last.pth", "best.pth", "args.yaml", "summary.csv", "train.log"} <= {p.name for p in run_dir.iterdir()}
    assert yaml.safe_load((run_dir / "args.yaml").read_text())["model"] == f"test_{name}"

    sheet, table = tmp_path / "sheets" / "digits.png", tmp_path / "tables" / "digits.csv"
    flags = ("--digits", "--checkpoint", run_dir / "last.pth", "--png", sheet, "--csv", table, "--device", "cpu")
    status, out, _ = run(capsys, predict, *flags)
    assert status == 0 and out.endswith(f"test_{name} held-out accuracy {accuracy[1]} %\n")
    assert Image.open(sheet).size[0] > 1000
    with open(table, newline="") as file:
        first = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    assert len(first) == 360
    right = sum(row["prediction"] == row["truth"] for row in first)
    assert f"{100 * right / 360:.2f}" == accuracy[1]


def test_predicting_a_folder_with_labels(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained / "output" / "run" / "best.pth"
    status, out, _ = run(capsys, predict, "--checkpoint", checkpoint, trained / "images" / "val", "--rows", 2)
    assert status == 0
    assert "test_vmamba: 6 images" in out and "4 more, all with --csv" in out
    assert re.search(r"^test_vmamba accuracy \d+\.\d\d %$", out, re.MULTILINE)


def test_predicting_an_image_without_a_label(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "what.jpg"
    Image.new("L", (40, 20)).save(image)
    sheet = tmp_path / "sheet.png"
    checkpoint = trained / "output" / "run" / "last.pth"
    status, out, _ = run(capsys, predict, "--checkpoint", checkpoint, image, "--png", sheet)
    assert status == 0 and "what.jpg" in out and "accuracy" not in out and sheet.exists()


def test_predicting_stops_at_unreadable_images_unless_asked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    words = ("--checkpoint", trained / "output" / "run" / "last.pth", tmp_path)
    status, out, err = run(capsys, predict, *words)
    assert status == 1 and not out
    assert "error: 1 of 2 images cannot be read:" in err and "bad.png" in err and "--skip-bad-images 1" in err
    status, out, err = run(capsys, predict, *words, "--skip-bad-images", 1)
    assert status == 0 and "test_vmamba: 1 images" in out and "bad.png" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["photo.jpg", "--digits"], "give image files or folders, or --digits, and not both"),
        ([], "give image files or folders, or --digits, and not both"),
    ],
)
def test_predict_wants_one_kind_of_images(
    trained: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, predict, "--checkpoint", trained / "output" / "run" / "last.pth", *words)
    assert status == 2 and message in err


@pytest.mark.parametrize("flag", ["--top", "--rows", "--batch-size"])
@pytest.mark.parametrize("number", ["0", "-1", "1.5", "few"])
def test_predict_counts_from_one(flag: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(capsys, predict, "--digits", "--checkpoint", "none.pth", f"{flag}={number}")
    assert left.value.code == 2
    assert f"argument {flag}: must be a whole number of at least 1, got {number!r}" in capsys.readouterr().err


def test_errors_are_one_sentence_and_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, train, "--modle", "x")
    assert status == 2 and err == "error: unknown flag --modle; did you mean --model? --help lists all.\n"
    status, _, err = run(capsys, train, "--model", "test_vmamba", "--output", tmp_path, "--data-dir", tmp_path / "none")
    assert status == 1 and err.startswith(f"error: --data-dir {tmp_path / 'none'} does not exist; the layout is ")
    status, _, err = run(capsys, predict, "--checkpoint", tmp_path / "none.pth", "--digits")
    assert status == 1 and err == f"error: checkpoint {tmp_path / 'none.pth'} does not exist.\n"
