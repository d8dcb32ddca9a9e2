"""Options: where they come from, and what is said of wrong ones."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from timm import create_model

from tests.train import timm_options
from tests.train.runs import ROOT
from vision_mamba.train import model as models
from vision_mamba.train.errors import ConfigError
from vision_mamba.train.options import OURS_ALONE, READER, Config


def no_checkpoint(path: str) -> dict:
    raise AssertionError(f"nobody should read {path}")


def parsed(*words: str) -> Config:
    return READER.parse(words, no_checkpoint)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lr: 1e-2\nepochs: 7\nmodel_kwargs: {img_size: 32}\namp: true\n")
    config = parsed("--config", str(file), "--epochs", "9", "--no-amp", "--scale", "0.5", "1")
    assert (config.lr, config.epochs, config.amp, config.scale) == (0.01, 9, False, (0.5, 1.0))
    assert config.model_kwargs == {"img_size": 32}
    assert config.batch_size == Config.batch_size


def test_none_unsets_an_option(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("aa: rand-m9\nclip_grad: 1.0\ndrop: none\nsched: none\n")
    words = ("--aa", "none", "--clip-grad", "none", "--model-kwargs", "none", "--mean", "none", "--resume", "none")
    config = parsed("--config", str(file), *words)
    assert [config.aa, config.clip_grad, config.drop, config.model_kwargs, config.mean, config.resume] == [None] * 6
    assert config.sched == "none" and parsed("--resume", "none") == Config()


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: 1\nlerning_rate: 3", r"a.yaml:2: unknown key 'lerning_rate'; did you mean 'lr'\?"),
        ("optimizer: adamw", r"a.yaml:1: unknown key 'optimizer'; did you mean 'opt'\?"),
        ("batch-size: 3", r"unknown key 'batch-size'; did you mean 'batch_size'\?"),
        ("lr: 1\nlr: 2", r"a.yaml:2: lr is given twice"),
        ("lr: fast", r"a.yaml:1: lr must be a number, got 'fast'"),
        ("epochs: 1.5", r"a.yaml:1: epochs must be a whole number, got 1.5"),
        ("epochs: true", r"epochs must be a whole number, got True"),
        ("amp: 1", r"amp must be true or false, got 1"),
        ("model_kwargs: 32", r"model_kwargs must be a mapping such as \{img_size: 32\}, got 32"),
        ("mean: [a]", r"mean must be a list of numbers, got \['a'\]"),
        ("scale: [0.1, 0.5, 1]", r"scale must be 2 numbers"),
        ("scale: [0.9, 0.1]", r"scale must have the least number first, got \[0.9, 0.1\]"),
        ("std: [0.0]", r"std must be at least 1e-06, got \[0.0\]"),
        (
            "train_interpolation: cubic",
            r"is 'cubic', which is unknown; did you mean 'bicubic'\? Known: random, nearest",
        ),
        ("model: 3", r"model must be text, got 3"),
        ("momentum: null", r"momentum must be a number, got None"),
        (
            "dataset: hfsd/cats",
            r"dataset is 'hfsd/cats', which is unknown; .* Known: folder, digits, torch/NAME, hfds/",
        ),
        ("train_img_sizes: [32, 48.5]", r"train_img_sizes must be a list of whole numbers, got \[32, 48.5\]"),
        ("device_modules: [3]", r"device_modules must be a list of names, got \[3\]"),
        ("epochs: 0", r"epochs must be at least 1, got 0"),
        ("hflip: 1.5", r"hflip must be between 0 and 1, got 1.5"),
        ("opt: adamv", r"opt is 'adamv', which is unknown; did you mean 'adam"),
        ("sched: cosin", r"sched is 'cosin', which is unknown; did you mean 'cosine'\? Known: cosine, tanh"),
        ("- lr", r"must be lines of 'key: value', got a seq"),
        ("lr: [", r"config .*a.yaml cannot be read: "),
    ],
)
def test_a_wrong_file_is_refused_with_the_line_and_the_way_out(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        READER.read_yaml(file)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lerning-rate", "3"], r"unknown flag --lerning-rate; did you mean --lr\?"),
        (["--batchsize=3"], r"unknown flag --batchsize; did you mean --batch-size\?"),
        (["--lr", "fast"], r"--lr must be a number, got 'fast'"),
        (["--epochs", "many"], r"--epochs must be a whole number, got 'many'"),
        (["--epochs"], r"--epochs: expected one argument"),
        (["--epochs", "3", "more"], r"'more' follows no flag that takes it"),
        (["--model-kwargs", "img_size"], r"--model-kwargs must be words like img_size=32, got 'img_size'"),
        (["--config", "nowhere.yaml"], r"config nowhere.yaml cannot be read: .*No such file"),
    ],
)
def test_a_wrong_flag_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*words)


def test_each_switch_can_be_turned_on_and_off() -> None:
    switches = [name for name, rule in READER.rules.items() if rule.kind is bool]
    assert "no_aug" in switches and "amp" in switches
    for name in switches:
        flag = name.replace("_", "-")
        assert getattr(parsed(f"--{flag}"), name) is True and getattr(parsed(f"--no-{flag}"), name) is False


def test_help_names_every_option_and_shows_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"0"):
        parsed("--help")
    told = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in told for name in READER.rules)
    assert "--resume output/digits_vmamba/last.pth" in told and "--clip-mode {norm,value,agc}" in told


FILES = [
    file for kind in ("digits", "imagefolder", "in1k") for file in sorted((ROOT / "configs" / kind).glob("*.yaml"))
]
CONFIGS = [file for file in FILES if "tools/train.py" in file.read_text()]
SHARED = [file for file in CONFIGS if file.parent.name != "digits"]  # a data set that timm does not have


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_each_config_names_a_model_that_exists(file: Path) -> None:
    values = READER.read_yaml(file)
    models.check_name(values["model"])
    if "model_kwargs" in values:
        create_model(values["model"], **values["model_kwargs"])
    text = file.read_text()
    assert text.startswith("#"), "a config begins with what to expect and how to run it"
    assert f"--config {file.relative_to(ROOT)}" in text


@pytest.mark.parametrize("file", SHARED, ids=lambda path: path.stem)
def test_each_config_means_the_same_to_timm(file: Path) -> None:
    values = READER.read_yaml(file)
    alone = set(values) - set(timm_options.DEFAULTS)
    assert alone <= OURS_ALONE and all(name in file.read_text().split("\n\n")[0] for name in alone)
    for name, default in timm_options.DEFAULTS.items():
        ours = getattr(Config(), name)
        same = ours == (tuple(default) if isinstance(default, list) else default) or not (ours or default)
        assert same or name in values or name in PER_RUN, f"{name} is {ours!r} here and {default!r} in timm; say it"


PER_RUN = {"dataset", "output", "device", "lr_base", "decay_epochs"}  # asked for on the command line, or not in use


def test_every_option_is_timms_or_is_listed_as_ours() -> None:
    assert set(READER.rules) - OURS_ALONE == set(timm_options.DEFAULTS)


@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="timm's train.py is not in its distributions: name the file")
def test_timms_own_parser_takes_each_config(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in SHARED:
        script = runpy.run_path(os.environ["TIMM_TRAIN"])
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file), "--device-modules", "vision_mamba"])
        arguments, _ = script["_parse_args"]()
        ours = Config(**READER.read_yaml(file)).plain()
        for name in READER.read_yaml(file):
            assert getattr(arguments, name) == ours[name], f"{file}: {name}"


def test_saved_options_give_the_same_run() -> None:
    config = parsed("--scale", "0.5", "1", "--model-kwargs", "img_size=32", "--seed", "7")
    plain = yaml.safe_load(yaml.safe_dump(config.plain()))
    assert READER.parse(["--resume", "output/run/last.pth"], lambda path: plain) == Config(
        **{**vars(config), "output": "output", "experiment": "run", "resume": "output/run/last.pth"}
    )


def test_options_of_a_checkpoint_from_elsewhere_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"options saved in it have the unknown key 'lerning_rate'"):
        READER.parse(["--resume", "output/run/last.pth"], lambda path: {"lerning_rate": 1})


@pytest.mark.parametrize(
    "name, near", [("vmamba_tiny_s1l9", "vmamba_tiny_s1l"), ("resnet5o", "resnet5"), ("test_vimm", "test_vim")]
)
def test_an_unknown_model_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"--model '{name}' is not a registered model; did you mean '{near}"):
        models.check_name(name)


def test_an_argument_that_the_model_lacks_is_refused() -> None:
    config = Config(model="test_vmamba", model_kwargs={"dephts": [1]})
    with pytest.raises(ConfigError, match=r"model 'test_vmamba' takes no such argument: .*'dephts'"):
        models.create(config, 2)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--device cuda:77 cannot be used here; this machine has cpu"):
        models.device("cuda:77")
