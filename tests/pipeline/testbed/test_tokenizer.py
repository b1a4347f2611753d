"""The testbed's tokenizer keeps every text and puts BOS first."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.specs import WorldSpec
from pipeline.testbed.lexicon import OPENINGS
from pipeline.testbed.tokenizer import train_tokenizer
from pipeline.testbed.world import DOMAINS, PRETRAINING_MIXTURE, world_documents

LONGEST_PREFIX = 4


def texts(mixture: dict[str, float], count: int, split: str = "train") -> list[str]:
    rows = itertools.islice(world_documents(WorldSpec(), mixture, split, 0), count)
    return [text for _, text in rows]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(texts(dict(PRETRAINING_MIXTURE), 500), 1024)


def test_every_domain_and_any_other_text_survives_a_round_trip(tokenizer: Any) -> None:
    foreign_to_it = ["日本語 🙂\t\r\n  two  spaces .", "", " ", "<not special>"]
    for text in foreign_to_it + [text for name in DOMAINS for text in texts({name: 1.0}, 20)]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_bos_comes_first_and_no_other_special_token_is_added(tokenizer: Any) -> None:
    ids = tokenizer("Here is the next page.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<s>", "</s>", "<pad>"]
    assert len(tokenizer) == 1024


def test_every_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    tokens = [token.strip("Ġ") for token in tokenizer.tokenize("12 + 345 = 357")]
    assert tokens == ["1", "2", "+", "3", "4", "5", "=", "3", "5", "7"]


def test_training_twice_gives_the_same_bytes(tokenizer: Any, tmp_path: Path) -> None:
    again = train_tokenizer(texts(dict(PRETRAINING_MIXTURE), 500), 1024)
    for name, one in (("first", tokenizer), ("second", again)):
        one.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_saved_tokenizer_encodes_alike(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(dict(PRETRAINING_MIXTURE), 20, "evaluation"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


def test_the_longest_prefix_of_a_common_opening_leaves_the_domain_open(tokenizer: Any) -> None:
    for opening in OPENINGS:
        assert len(tokenizer.tokenize(opening)) > LONGEST_PREFIX


def test_most_documents_of_every_domain_hold_a_window_of_128_tokens(tokenizer: Any) -> None:
    for name in DOMAINS:
        lengths = [len(tokenizer(text)["input_ids"]) for text in texts({name: 1.0}, 200)]
        long = sum(length >= 128 for length in lengths) / len(lengths)
        assert 0.6 < long < 1.0
        assert 150 < sum(lengths) / len(lengths) < 550
