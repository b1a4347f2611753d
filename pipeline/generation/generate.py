"""Self-generation: a model goes on from the first few tokens of real texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import GenerationConfig

from pipeline.data.prefixes import read_prefixes, sources
from pipeline.errors import InputError
from pipeline.generation.sampling import Sampling, redraw_seed
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.generation.vllm_engine import VllmEngine
from pipeline.models.loading import load_tokenizer, loaded
from pipeline.models.vocabulary import end_ids, known_ids
from pipeline.progress import phase
from pipeline.shards import join_shards, shard_samples
from pipeline.specs import GenerateSpec, StageSpec, Vllm, canonical_json
from pipeline.stage import Artifacts, Latest

SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "source": pa.string(),
        "prefix_tokens": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "text": pa.string(),
    }
)

_prefixes: Latest[list[list[int]]] = Latest()
_vllm_engines: Latest[VllmEngine] = Latest(release=VllmEngine.close)


class Sample(NamedTuple):
    """A generated text: the given ids, then the generated ones, with EOS if it came to that.

    A text that EOS would end at once has the given ids alone.
    """

    sample_id: int
    prefix_tokens: int
    token_ids: list[int]
    text: str


def run_shard(spec: GenerateSpec, index: int, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Generate one shard's samples together and write `samples.parquet`.

    Raises:
        InputError: if the source has too few texts that are long enough.
    """
    engine, tokenizer = loaded_engine(spec, artifacts)
    with phase("reading prefixes"):
        prefixes = _prefixes.get(spec.key, lambda: read_prefixes(spec, tokenizer))
    numbers = list(shard_samples(spec, index))
    samples = generate_samples(
        engine,
        tokenizer,
        [prefixes[number] for number in numbers],
        numbers,
        sampling=Sampling(**{name: getattr(spec, name) for name in Sampling._fields}),
        seqlen=spec.seqlen,
        seed=spec.seed,
        redraws=spec.redraws,
    )
    columns: dict[str, list[Any]] = {
        name: [getattr(sample, name) for sample in samples] for name in Sample._fields
    }
    origins = sources(spec)
    columns["source"] = [origins[number] for number in numbers]
    table = pa.table(columns, schema=SCHEMA)
    facts = canonical_json(engine.facts)
    pq.write_table(table.replace_schema_metadata({"engine": facts}), output / "samples.parquet")
    return _report(table, spec.seqlen, {facts})


def run(spec: GenerateSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Join the shards into one `samples.parquet`, sorted by sample_id."""
    table = join_shards(spec.shards(), artifacts, output, "samples.parquet")
    files = [artifacts[shard.key] / "samples.parquet" for shard in spec.shards()]
    return _report(table, spec.seqlen, {pq.read_schema(file).metadata[b"engine"] for file in files})


def loaded_engine(spec: GenerateSpec, artifacts: Artifacts) -> tuple["Engine", Any]:
    """The spec's engine with its model, and the tokenizer."""
    if not isinstance(spec.backend, Vllm):
        model, tokenizer = loaded(spec.model, artifacts)
        return TransformersEngine(model), tokenizer
    folder = artifacts[spec.model.key] if isinstance(spec.model, StageSpec) else None
    settings = spec.model_dump_json(include={"model", "backend", "seqlen", "shard_size"})
    engine = _vllm_engines.get((settings, folder), lambda: VllmEngine(spec, artifacts))
    return engine, load_tokenizer(spec.model, artifacts)


def _report(table: pa.Table, seqlen: int, facts: set[bytes]) -> dict[str, Any]:
    lengths = pc.list_value_length(table["token_ids"])
    return {
        "samples": len(table),
        "tokens_generated": pc.sum(pc.subtract(lengths, table["prefix_tokens"])).as_py(),
        "samples_of_full_length": pc.sum(pc.equal(lengths, seqlen)).as_py(),
        "engines": [json.loads(each) for each in sorted(facts)],
    }


# ------------------------------------------------------------------------------------- generation


class Engine(Protocol):
    """What generates: token ids in, token ids out."""

    generation_config: GenerationConfig
    """The checkpoint's own settings, of which only the ids that end a text count."""

    @property
    def facts(self) -> dict[str, Any]:
        """Engine, version and device, which go with the artifact."""

    def write(
        self,
        prefixes: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        ends: Sequence[int],
        known: Sequence[int],
        *,
        sampling: Sampling,
        seqlen: int,
        seed: int,
    ) -> list[list[int]]:
        """What comes after each prefix, up to the first of `ends` or to `seqlen` ids in all.

        Ids past either may follow. Only `known` ids, the tokenizer's, are drawn, and which depends
        on the seed and a sample's number, not on the rest of the batch.
        """


def generate_samples(
    engine: Engine,
    tokenizer: Any,
    prefixes: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    *,
    sampling: Sampling,
    seqlen: int,
    seed: int = 0,
    redraws: int = 0,
) -> list[Sample]:
    """Go on from each prefix until EOS or `seqlen` tokens.

    Args:
        prefixes: the ids given, at least one of each sample; lengths may differ.
        sample_ids: their numbers.
        seqlen: tokens at the most, the prefix included.
        redraws: how often those that are shorter are drawn again, as one batch each time; of all
            draws the longest is kept, of equal ones the first.

    Raises:
        InputError: if a prefix leaves no room in `seqlen`, or less than the least to write.
        NonFiniteError: if the model's logits are NaN or infinite; it names the sample, the
            token and, on transformers, the module where such values begin.
    """
    longest = max(len(prefix) for prefix in prefixes)
    if longest >= seqlen:
        remedy = f"a prefix already has {longest} tokens: raise seqlen or lower prefix_tokens"
        raise InputError("seqlen", seqlen, remedy)
    if longest + sampling.min_new_tokens > seqlen:
        remedy = f"of {seqlen} tokens a prefix already has {longest}: lower it or raise seqlen"
        raise InputError("min_new_tokens", sampling.min_new_tokens, remedy)
    ends, known = end_ids(engine.generation_config, tokenizer), known_ids(tokenizer)
    found: list[list[int]] = [[] for _ in prefixes]
    short = list(range(len(prefixes)))
    for draw in range(1 + redraws):
        written = engine.write(
            [prefixes[place] for place in short],
            [sample_ids[place] for place in short],
            ends,
            known,
            sampling=sampling,
            seqlen=seqlen,
            seed=redraw_seed(seed, draw) if draw else seed,
        )
        for place, row in zip(short, written, strict=True):
            ids = [*prefixes[place], *until_end(row, ends)[: seqlen - len(prefixes[place])]]
            found[place] = max(found[place], ids, key=len)
        short = [place for place in short if len(found[place]) < seqlen]
        if not short:
            break
    samples = []
    for number, prefix, ids in zip(sample_ids, prefixes, found, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        samples.append(Sample(number, len(prefix), ids, text))
    return samples


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to the first of `ends`, that one included; none if it comes at once."""
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1] if first else []
