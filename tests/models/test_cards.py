"""What the cards of weights say, and what happens where weights cannot be had."""

from __future__ import annotations

import re
import urllib.error

import huggingface_hub.errors
import pytest
import timm
import timm.models._builder as timm_builder
import torch

from tests.registered import ALL, is_ours

CARDS = {name: timm.get_pretrained_cfg(name) for name in timm.list_models(include_tags=True) if is_ours(name)}
PUBLISHED = [name for name, card in CARDS.items() if card.url or card.hf_hub_id]
FIRST = {name.split("_")[0]: name for name in reversed(PUBLISHED)}  # of each family


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_complete(name: str) -> None:
    card = CARDS[name]
    assert card.tag and len(card.input_size) == 3 and 0.8 < card.crop_pct <= 1 and card.interpolation == "bicubic"
    assert len(card.mean) == len(card.std) == 3 and card.num_classes == 1000
    assert card.license in ("apache-2.0", "mit", "cc-by-nc-sa-4.0", "unspecified")
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", card.paper_ids) and card.paper_name
    assert card.origin_url.startswith("https://github.com/")
    if name in PUBLISHED:
        assert card.notes and card.tag != "untrained"
        assert card.url.startswith("https://") if card.url else card.hf_hub_filename
    else:
        assert card.tag == "untrained"


def test_every_model_has_a_card_and_every_family_weights() -> None:
    assert {name.split(".")[0] for name in CARDS} == set(ALL)
    families = {name.split("_")[0] for name in ALL} - {"test"}
    assert FIRST.keys() == families


@pytest.mark.parametrize("name", FIRST.values())
def test_without_a_network_it_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    def not_in_cache(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the requested files in the local cache")

    for loader in ("load_state_dict_from_url", "download_cached_file"):
        monkeypatch.setattr(timm_builder, loader, unreachable)
    monkeypatch.setattr(timm_builder, "load_state_dict_from_hf", not_in_cache)
    card = CARDS[name]
    place = card.url or f"{card.hf_hub_filename} of https://huggingface.co/{card.hf_hub_id}"
    sentence = rf"{re.escape(name.split('.')[0])}: its weights could not be fetched, {re.escape(place)}: .*"
    with torch.device("meta"), pytest.raises(ConnectionError, match=sentence + r"pretrained_cfg_overlay=dict\(file="):
        timm.create_model(name, pretrained=True)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"test_vim: no weights at nowhere\.pth"):
        timm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay=dict(file="nowhere.pth"))


def test_what_was_never_trained_is_told_so() -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match="No pretrained weights exist for vmamba_tiny_steady"):
        timm.create_model("vmamba_tiny_steady", pretrained=True)
