"""What the sharded stages share: which samples a shard has, what a worker holds, the join."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.models import Artifacts, load_model, load_tokenizer
from pipeline.specs import GenerateSpec, Model, ShardSpec, StageSpec, canonical_json

Value = TypeVar("Value")


class Latest(Generic[Value]):
    """The value last asked for, so that the shards on one worker load and read it once.

    The one before is let go before the next is made: two models need not fit together.

    Args:
        release: what frees a value that reference counting does not.
    """

    def __init__(self, release: Callable[[Value], None] = lambda value: None) -> None:
        self._held: dict[object, Value] = {}
        self._release = release

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        """The value of a key, made unless it is the last one's."""
        if key not in self._held:
            for value in self._held.values():
                self._release(value)
            self._held.clear()
            self._held[key] = make()
        return self._held[key]

    def forget(self) -> None:
        """Let go of the value without releasing it: whoever has it keeps it."""
        self._held.clear()


_models: Latest[tuple[Any, Any]] = Latest()


def loaded(model: Model, artifacts: Artifacts) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Raises:
        InputError: if it has one of them only, or neither.
    """
    folder = artifacts[model.key] if isinstance(model, StageSpec) else None
    return _models.get(
        (canonical_json(model.model_dump(mode="json")), folder),
        lambda: (load_model(model, artifacts), load_tokenizer(model, artifacts)),
    )


def shard_samples(spec: GenerateSpec, index: int) -> range:
    """The numbers of the samples in a shard."""
    first = index * spec.shard_size
    return range(first, min(first + spec.shard_size, spec.num_samples))


def join_shards(
    shards: Sequence[ShardSpec], artifacts: Artifacts, output: Path, name: str
) -> pa.Table:
    """Write the rows of all shards' file `name`, sorted by sample_id, to `output`; returns them."""
    tables = [pq.read_table(artifacts[shard.key] / name) for shard in shards]
    table = pa.concat_tables(tables).sort_by("sample_id")
    pq.write_table(table, output / name)
    return table
