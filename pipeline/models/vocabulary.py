"""The ids of a tokenizer: which end a text, and whether two models give them the same meaning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import GenerationConfig

from pipeline.errors import InputError


def known_ids(tokenizer: Any) -> list[int]:
    """Return the ids of a tokenizer's tokens, in order.

    There may be gaps, and a model may have rows for more ids, which training never touched.
    """
    return sorted(set(tokenizer.get_vocab().values()))


def end_ids(settings: GenerationConfig, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: those of the generation settings, then the tokenizer's."""
    named = settings.eos_token_id
    ends = list(named) if isinstance(named, list | tuple) else [named]
    known = set(known_ids(tokenizer))
    return [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end in known]


def edge_ids(settings: GenerationConfig, tokenizer: Any) -> list[int]:
    """Return the ids that begin, end or pad a text, if the tokenizer has them."""
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    return sorted({*end_ids(settings, tokenizer), *others})


def embedding_rows(config: Any) -> int:
    """Return the number of rows of embeddings in a model of this configuration."""
    rows: int = config.get_text_config().vocab_size
    return rows


def check_rows(location: str, tokenizer: Any, rows: int) -> None:
    """Check that a model has a row of embeddings for every id of its tokenizer.

    Special tokens may lack one, like those for images in the text part of a larger model.

    Raises:
        InputError: if another id has no row.
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
    """The meaning of token ids for a model."""

    name: str
    """The model's name."""
    ids: Mapping[str, int]
    """By token, as `get_vocab` of the tokenizer returns them."""
    rows: int
    """Rows of embeddings."""


def check_shared(field: str, value: str, reader: Vocabulary, writer: Vocabulary) -> None:
    """Check that a model may read the token ids that another one wrote.

    Args:
        field: the field of the grid that names one of the two.
        value: the field's value.

    Raises:
        InputError: if they have other meanings for the reader, or it has no rows for some.
    """
    conflict = (
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
            f"{conflict}, whose vocabulary is another ({token!r} is {reader.ids.get(token)} and "
            f"{writer.ids.get(token)}): take models with one tokenizer",
        )
    missing = [token for token in reader.ids.values() if reader.rows <= token < writer.rows]
    if missing:
        sizes = f"{reader.rows} rows of embeddings for {writer.rows}"
        remedy = f"{conflict}, {sizes}: none for id {min(missing)}; take another model"
        raise InputError(field, value, remedy)


def check_ids(ids: npt.NDArray[np.int32], rows: int) -> None:
    """Check that a model has rows of embeddings for all ids of a text.

    Raises:
        InputError: if the largest id has none.
    """
    largest = int(ids.max())
    if largest >= rows:
        remedy = f"a text has this id, and the model only {rows} rows of embeddings"
        raise InputError("token_ids", largest, f"{remedy}: take the tokenizer that belongs to it")
