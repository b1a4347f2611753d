"""Which ids a tokenizer has, which of them end a text, and whether two models mean the same by
them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import GenerationConfig

from pipeline.errors import InputError


def known_ids(tokenizer: Any) -> list[int]:
    """The ids that stand for something, in order. A model may have rows for more, which training
    never touched; and there may be holes."""
    return sorted(set(tokenizer.get_vocab().values()))


def end_ids(settings: GenerationConfig, tokenizer: Any) -> list[int]:
    """The ids that end a text: those that the checkpoint's generation settings name, then the
    tokenizer's own."""
    named = settings.eos_token_id
    ends = list(named) if isinstance(named, list | tuple) else [named]
    known = set(known_ids(tokenizer))
    return [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end in known]


def edge_ids(settings: GenerationConfig, tokenizer: Any) -> list[int]:
    """The ids that begin, end and pad a text, those that the tokenizer has."""
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    return sorted({*end_ids(settings, tokenizer), *others})


def embedding_rows(config: Any) -> int:
    """How many ids a model of this configuration has rows for."""
    rows: int = config.get_text_config().vocab_size
    return rows


def check_rows(location: str, tokenizer: Any, rows: int) -> None:
    """Check that a model has a row for every id that its tokenizer makes of a text.

    Special tokens may lack one, as those for images do in the text part of a larger model.

    Raises:
        InputError: if it has not.
    """
    known = known_ids(tokenizer)
    beyond = {token for token in known if token >= rows} - set(tokenizer.all_special_ids)
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    beyond = {token for token in beyond if token not in decoder or not decoder[token].special}
    if beyond:
        raise InputError(
            "model",
            location,
            f"has {rows} rows of embeddings, and its tokenizer ids up to {known[-1]} "
            f"({tokenizer.convert_ids_to_tokens(min(beyond))!r} is {min(beyond)}): resize the "
            "embeddings, or take the tokenizer that belongs to it",
        )


class Vocabulary(NamedTuple):
    """What a model makes of token ids."""

    name: str
    """The model's."""
    ids: Mapping[str, int]
    """By token, as the tokenizer's `get_vocab` gives them."""
    rows: int
    """Of embeddings."""


def check_shared(field: str, value: str, reader: Vocabulary, writer: Vocabulary) -> None:
    """Check that a model may read the token ids that another one wrote.

    Args:
        field, value: what in the grid names one of them.

    Raises:
        InputError: if it gives them another meaning, or has no rows for some.
    """
    meets = (
        f"would read token ids of {writer.name}"
        if value == reader.name
        else f"its token ids would be read by {reader.name}"
    )
    if reader.ids != writer.ids:
        tokens = {*reader.ids, *writer.ids}
        token = min(each for each in tokens if reader.ids.get(each) != writer.ids.get(each))
        raise InputError(
            field,
            value,
            f"{meets}, whose vocabulary is another ({token!r} is {reader.ids.get(token)} and "
            f"{writer.ids.get(token)}): take models with one tokenizer",
        )
    lost = [token for token in reader.ids.values() if reader.rows <= token < writer.rows]
    if lost:
        sizes = f"{reader.rows} rows of embeddings for {writer.rows}"
        remedy = f"{meets}, {sizes}: none for id {min(lost)}; take another model"
        raise InputError(field, value, remedy)


def check_ids(ids: npt.NDArray[np.int32], rows: int) -> None:
    """Check that a model has rows of embeddings for all ids of a text.

    Raises:
        InputError: if one lies beyond.
    """
    greatest = int(ids.max())
    if greatest >= rows:
        remedy = f"a text has this id, and the model only {rows} rows of embeddings"
        raise InputError("token_ids", greatest, f"{remedy}: take the tokenizer that belongs to it")
