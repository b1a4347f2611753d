"""Samples: texts that a filter chooses from. A model wrote them, or they were drawn."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

SAMPLES_SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "source": pa.string(),
        "prefix_tokens": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "text": pa.string(),
    }
)


class Sample(NamedTuple):
    """A text: the given ids, then the generated ones, with the final EOS if there is one.

    A text that EOS would end at once has the given ids alone. In a stretch of real text no id is
    given: `prefix_tokens` is 0.
    """

    sample_id: int
    prefix_tokens: int
    token_ids: list[int]
    text: str


def samples_table(samples: Sequence[Sample], sources: Sequence[str | None]) -> pa.Table:
    """Return samples as a table of `SAMPLES_SCHEMA`, with the name of each one's corpus."""
    columns: dict[str, Sequence[Any]] = {
        name: [getattr(sample, name) for sample in samples] for name in Sample._fields
    }
    return pa.table({**columns, "source": sources}, schema=SAMPLES_SCHEMA)


def text_of(token_ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of token ids, without special tokens."""
    text: str = tokenizer.decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
