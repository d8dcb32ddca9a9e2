"""The two command lines from end to end: training on the digits, and predicting."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.train import runs
from tools import convert, make_digits_folder, predict, train, validate
from vision_mamba.train.options import Config


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


def test_names_of_images_come_from_stdin_if_there_are_any(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--checkpoint", trained / "output" / "run" / "best.pth", "--device", "cpu", "-")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run(capsys, predict, *words)[::2] == (2, "error: stdin named no image; it is read for one name a line.\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{trained / 'images/val/left/0.png'}\n"))
    status, out, err = run(capsys, predict, *words)
    assert status == 0 and "test_vmamba: 1 images" in out, err


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


def test_validating_a_checkpoint(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, table = trained / "output" / "run" / "best.pth", tmp_path / "table.csv"
    labels = {f"{number}.png": [0, 1] if number else [] for number in range(3)}
    (tmp_path / "real.json").write_text(json.dumps(labels))
    words = ("--checkpoint", checkpoint, "--data-dir", trained / "images", "--workers", 0, "--device", "cpu")
    status, _, err = run(capsys, validate, *words, "--real-labels", tmp_path / "real.json", "--csv", table)
    assert status == 0, err
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    expected = torch.load(checkpoint, weights_only=True)["metric"]
    assert float(row["top1"]) == expected and row["images"] == "6"
    assert row["real1"] == row["real5"] == "100.0", "either class is right, and the images without labels do not count"
    status, out, _ = run(capsys, validate, *words, "--dry-run")
    assert status == 0 and "top1" not in out


@pytest.mark.parametrize(
    "words, told",
    [
        (("--dataset", "hfsd/cats"), "--dataset is 'hfsd/cats', which is unknown"),
        (("--img-size", "64"), "a checkpoint has the sizes it was trained with"),
        (("--csv", "/dev/full"), "No space left on device"),
        (("--digits",), "the images are of 10 classes (0, 1, 2, 3, 4, ... and 5 more), and test_vmamba has 2 outputs"),
    ],
)
def test_validating_what_cannot_be(
    trained: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str], told: str
) -> None:
    checkpoint, images = trained / "output" / "run" / "last.pth", trained / "images"
    status, _, err = run(capsys, validate, "--checkpoint", checkpoint, "--data-dir", images, "--workers", "0", *words)
    assert status in (1, 2) and told in err


def test_the_words_after_training_name_the_held_out_images() -> None:
    chosen = {"dataset": "wds/mine", "data_dir": "shards", "val_split": "held-{0..3}.tar", "class_map": "names.txt"}
    read = vars(validate.parser().parse_args(train.held_out(Config(**chosen))))
    assert {name: read[name] for name in chosen} == chosen
    assert train.held_out(Config(data_dir="mine")) == ["--data-dir", "mine"]
    assert train.held_out(Config(dataset="digits")) == ["--digits"]


def test_validating_tells_who_waits_for_whom(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--checkpoint",
        trained / "output" / "run" / "best.pth",
        "--data-dir",
        trained / "images",
        "--device",
        "cpu",
    )
    status, out, err = run(capsys, validate, *words, "--workers", 0, "--batch-size", 2, "--batches", 2, "--throughput")
    assert status == 0, err
    assert "validation: the loader gives" in out and "training: the loader gives" in out


def test_a_converted_checkpoint_is_loaded_by_timm_and_says_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = trained / "output" / "run" / "best.pth", tmp_path / "model"
    status, out, err = run(capsys, convert, checkpoint, folder)
    assert status == 0 and "logits read back differ by 0 of the largest" in out, err
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert runs.same(dict(model.state_dict()), runs.weights(checkpoint.parent, checkpoint.name))
    assert model.pretrained_cfg["label_names"] == ["left", "upper"]
    image = trained / "images" / "val" / "left" / "*.png"
    words = ("--device", "cpu", "--json", tmp_path / "a.json")
    assert run(capsys, predict, "--checkpoint", checkpoint, image, *words)[0] == 0
    first = json.loads((tmp_path / "a.json").read_text())
    status, _, err = run(capsys, predict, "--model", f"local-dir:{folder}", image, *words)
    assert status == 0, err
    again = json.loads((tmp_path / "a.json").read_text())
    assert len(first) == 3 and [each["top"] for each in again] == [each["top"] for each in first]
    status, _, err = run(capsys, convert, checkpoint, folder)
    assert status == 2 and "exists; replace it with --overwrite" in err
    assert run(capsys, convert, checkpoint, folder, "--overwrite")[0] == 0
    (folder / "thesis.tex").write_text("years of work")
    status, _, err = run(capsys, convert, checkpoint, folder, "--overwrite")
    assert status == 1 and "holds thesis.tex" in err and (folder / "thesis.tex").exists()


class Stranger:
    """Something that only Python can rebuild."""


def test_a_checkpoint_that_does_not_fit_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = timm.create_model("test_vim", num_classes=3).state_dict()
    theirs, folder = tmp_path / "theirs.pth", tmp_path / "model"
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}, "config": Stranger()}, theirs)
    words = (theirs, folder, "--model", "test_vim")
    status, _, err = run(capsys, convert, *words)
    assert status == 1 and "holds Python objects besides tensors" in err and "Stranger" in err and "--trust" in err
    status, out, _ = run(capsys, convert, *words, "--trust", "--dry-run")
    assert status == 0 and f"{len(weights)} tensors, all used" in out and not folder.exists()
    torch.save({"model": {**weights, "strange.weight": torch.zeros(2)}}, theirs)
    status, _, err = run(capsys, convert, *words)
    assert status == 1 and "strange.weight" in err and not folder.exists()
    torch.save({"model": {name: value for name, value in weights.items() if name != "norm.weight"}}, theirs)
    status, _, err = run(capsys, convert, *words)
    assert status == 1 and "norm.weight" in err and not folder.exists()


def test_names_of_images_and_classes_may_come_from_elsewhere(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("west\nnorth\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{trained / 'images' / 'val' / 'left' / '0.png'}\n"))
    words = ("--checkpoint", trained / "output" / "run" / "last.pth", "--classes", names)
    status, out, err = run(capsys, predict, *words, "-")
    assert status == 0 and ("west" in out or "north" in out), err
    names.write_text("west\n")
    status, _, err = run(capsys, predict, *words, trained / "images" / "val")
    assert status == 2 and "must hold 2 names, one a line, found 1" in err


def test_the_smallest_run_survives_a_kill_word_for_word(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that README gives, killed in the middle and given again, ends like one that was let be."""

    monkeypatch.chdir(runs.ROOT)

    def command(name: str) -> list[str]:
        words = f"--config configs/digits/vmamba_pico.yaml --epochs 2 --seed 3 --device cpu --output {tmp_path}"
        return [*words.split(), "--experiment", name, "--resume", "auto"]

    killed = runs.start(*command("killed"), "--log-interval", "1")
    assert killed.stderr is not None
    for line in killed.stderr:
        if re.search("epoch 1/2 17/44", line):
            killed.kill()
    killed.communicate()
    saved = torch.load(tmp_path / "killed" / "last.pth", weights_only=True)
    assert saved["epoch"] == 0 and 10 <= saved["batch"] < 44 and saved["batch"] % 5 == 0
    for name in ("killed", "whole"):
        assert train.main(command(name)) == 0
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000
    assert runs.same(runs.weights(tmp_path / "killed"), runs.weights(tmp_path / "whole"))


def test_digits_on_photographs_are_the_same_with_any_number_of_processes(tmp_path: Path) -> None:
    for name, processes in (("one", "1"), ("two", "2")):
        words = ["--out", str(tmp_path / name), "--train", "12", "--val", "3", "--size", "64", "--processes", processes]
        assert make_digits_folder.main(words) == 0
    one, two = (sorted((tmp_path / name).rglob("*.jpg")) for name in ("one", "two"))
    assert len(one) == 15 and all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert len(list((tmp_path / "one" / "val").iterdir())) == 10, "a folder for each digit, empty or not"
    with pytest.raises(SystemExit, match="2"):
        make_digits_folder.main(words)
