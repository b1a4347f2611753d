"""Shards of samples: which samples a shard has, and the join of all shards' files."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.specs import DrawSpec, GenerateSpec, ShardSpec
from pipeline.stage import Artifacts


def shard_samples(spec: GenerateSpec | DrawSpec, index: int) -> range:
    """Return the numbers of a shard's samples."""
    first = index * spec.shard_size
    return range(first, min(first + spec.shard_size, spec.num_samples))


def join_shards(
    shards: Sequence[ShardSpec], artifacts: Artifacts, output: Path, name: str
) -> pa.Table:
    """Write the rows of all shards' file `name`, sorted by sample_id, to `output`; return them."""
    tables = [pq.read_table(artifacts[shard.key] / name) for shard in shards]
    table = pa.concat_tables(tables).sort_by("sample_id")
    pq.write_table(table, output / name)
    return table
