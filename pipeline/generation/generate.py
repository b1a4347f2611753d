"""Self-generation: a model continues the first few tokens of real texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import GenerationConfig

from pipeline.data.prefixes import prefix_sources, read_prefixes
from pipeline.data.samples import Sample, samples_table, text_of
from pipeline.errors import InputError
from pipeline.generation.sampling import Sampling, redraw_seed
from pipeline.generation.shards import join_shards, shard_samples
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.generation.vllm_engine import VllmEngine
from pipeline.models.loading import load_tokenizer, loaded
from pipeline.models.vocabulary import end_ids, known_ids
from pipeline.progress import phase
from pipeline.specs import GenerateSpec, StageSpec, Vllm, canonical_json
from pipeline.stage import Artifacts, Latest

_prefixes: Latest[list[list[int]]] = Latest()
_vllm_engines: Latest[VllmEngine] = Latest(release=VllmEngine.close)


def run_shard(spec: GenerateSpec, index: int, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Generate one shard's samples together and write `samples.parquet`.

    Raises:
        InputError: if the source has too few texts that are long enough.
        NonFiniteError: if the model's logits are NaN or infinite.
    """
    engine, tokenizer = loaded_engine(spec, artifacts)
    with phase("reading prefixes"):
        prefixes = _prefixes.get(spec.key, lambda: read_prefixes(spec, tokenizer))
    samples = generate_shard(spec, index, engine, tokenizer, prefixes)
    sources = prefix_sources(spec)
    table = samples_table(samples, [sources[sample.sample_id] for sample in samples])
    facts = canonical_json(engine.facts)
    pq.write_table(table.replace_schema_metadata({"engine": facts}), output / "samples.parquet")
    return _report(table, spec.seqlen, {facts})


def run(spec: GenerateSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Join the shards into one `samples.parquet`, sorted by sample_id."""
    table = join_shards(spec.shards(), artifacts, output, "samples.parquet")
    files = [artifacts[shard.key] / "samples.parquet" for shard in spec.shards()]
    return _report(table, spec.seqlen, {pq.read_schema(file).metadata[b"engine"] for file in files})


def loaded_engine(spec: GenerateSpec, artifacts: Artifacts) -> tuple["Engine", Any]:
    """Return the spec's engine with its model loaded, and the tokenizer."""
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
    """A loaded model that generates: token ids in, token ids out."""

    generation_config: GenerationConfig
    """The checkpoint's own settings; only the ids that end a text are used."""

    @property
    def facts(self) -> dict[str, Any]:
        """Engine, version and device, for the artifact's report."""

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
        """Return what follows each prefix, up to the first of `ends` or `seqlen` ids in all.

        More ids may follow either. Only `known` ids, the tokenizer's, are drawn. The draw depends
        on the seed and the sample's number, not on the rest of the batch.
        """


def generate_shard(
    spec: GenerateSpec,
    index: int,
    engine: Engine,
    tokenizer: Any,
    prefixes: Sequence[Sequence[int]],
) -> list[Sample]:
    """Generate the samples of one shard.

    Args:
        prefixes: those of all samples, by number.

    Raises:
        InputError: if a prefix leaves too little room in `seqlen`.
        NonFiniteError: if the model's logits are NaN or infinite.
    """
    numbers = shard_samples(spec, index)
    return generate_samples(
        engine,
        tokenizer,
        [prefixes[number] for number in numbers],
        numbers,
        sampling=Sampling(**{name: getattr(spec, name) for name in Sampling._fields}),
        seqlen=spec.seqlen,
        seed=spec.seed,
        redraws=spec.redraws,
    )


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
    """Continue each prefix until EOS or `seqlen` tokens.

    Args:
        prefixes: the given ids of each sample, at least one; lengths may differ.
        sample_ids: the number of each sample.
        seqlen: most tokens of a sample, prefix included.
        redraws: how often shorter samples are drawn again, as one batch each time. The longest
            draw is kept; of equally long ones the first.

    Raises:
        InputError: if a prefix leaves no room in `seqlen`, or less than `min_new_tokens`.
        NonFiniteError: if the model's logits are NaN or infinite. It names the sample, the token
            and, on transformers, the module where such values begin.
    """
    longest = max(len(prefix) for prefix in prefixes)
    if longest >= seqlen:
        remedy = f"a prefix already has {longest} tokens: raise seqlen or lower prefix_tokens"
        raise InputError("seqlen", seqlen, remedy)
    if longest + sampling.min_new_tokens > seqlen:
        remedy = f"of {seqlen} tokens a prefix already has {longest}: lower it or raise seqlen"
        raise InputError("min_new_tokens", sampling.min_new_tokens, remedy)
    ends, known = end_ids(engine.generation_config, tokenizer), known_ids(tokenizer)
    token_ids: list[list[int]] = [[] for _ in prefixes]
    unfinished = list(range(len(prefixes)))
    for draw in range(1 + redraws):
        written = engine.write(
            [prefixes[place] for place in unfinished],
            [sample_ids[place] for place in unfinished],
            ends,
            known,
            sampling=sampling,
            seqlen=seqlen,
            seed=redraw_seed(seed, draw) if draw else seed,
        )
        for place, row in zip(unfinished, written, strict=True):
            ids = [*prefixes[place], *until_end(row, ends)[: seqlen - len(prefixes[place])]]
            token_ids[place] = max(token_ids[place], ids, key=len)
        unfinished = [place for place in unfinished if len(token_ids[place]) < seqlen]
        if not unfinished:
            break
    samples = []
    for number, prefix, ids in zip(sample_ids, prefixes, token_ids, strict=True):
        samples.append(Sample(number, len(prefix), ids, text_of(ids, tokenizer)))
    return samples


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Return the ids up to the first of `ends`, which is included; none if it comes first."""
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1] if first else []
