"""Let a grid's dense model, and the best pruned model of each pruner, continue a text."""

import json
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cluster.store import Store
from jobs.gather import gather
from jobs.plan import Plan
from pipeline.errors import InputError
from pipeline.specs import EvaluateSpec

_NEW_TOKENS = 32
"""The most new tokens."""

_METRICS = ("bits_per_byte", "perplexity")
"""The first of these that was measured chooses the best, by its mean over texts."""


class Written(NamedTuple):
    """A model and the text that it wrote."""

    name: str
    """Pruner, target, calibration and seed, as far as the model has them."""
    text: str
    """The prompt and what follows."""


def write_samples(plan: Plan, store: Store, prompt: str) -> Iterator[Written]:
    """Let each model continue one prompt, with one seed and the paper's sampling.

    Raises:
        InputError: if no model of the grid was evaluated yet, or the prompt is empty.
    """
    chosen = best_cells(gather(plan, store))
    if not chosen:
        raise InputError("grid", plan.grid.name, "has no results yet: run it first")
    # Imported late: torch takes seconds, and a mistake is reported first.
    from transformers.utils.logging import disable_progress_bar

    from pipeline.generation.generate import generate_samples
    from pipeline.generation.sampling import Sampling
    from pipeline.generation.transformers_engine import TransformersEngine
    from pipeline.models.loading import load_model, load_tokenizer
    from pipeline.models.vocabulary import end_ids

    disable_progress_bar()  # loading takes only a second
    for name, key in chosen.items():
        spec = plan.specs[key]
        assert isinstance(spec, EvaluateSpec)
        artifacts = {stage.key: store.fetch(stage.key) for stage in spec.inputs()}
        tokenizer = load_tokenizer(spec.model, artifacts)
        given = tokenizer(prompt)["input_ids"]
        engine = TransformersEngine(load_model(spec.model, artifacts))
        while given and given[-1] in end_ids(engine.generation_config, tokenizer):
            given.pop()  # some tokenizers end every text
        if not given:
            raise InputError("prompt", prompt, "is empty: give at least one word")
        (sample,) = generate_samples(
            engine, tokenizer, [given], [0], sampling=Sampling(), seqlen=len(given) + _NEW_TOKENS
        )
        yield Written(name, sample.text)


def record_texts(store: Store, grid: str, prompt: str, written: Iterable[Written]) -> None:
    """Write `results/<grid>.texts.json`, which the report shows."""
    texts = [each._asdict() for each in written]
    document = {"prompt": prompt, "texts": texts}
    content = json.dumps(document, ensure_ascii=False, indent=2)
    store.write(f"results/{grid}.texts.json", content.encode())


def best_cells(table: pa.Table) -> dict[str, str]:
    """Return name and `evaluate_key` of each model's dense cell and each pruner's best cell."""
    rows = table.filter(pc.is_in(table["metric"], pa.array(_METRICS))).to_pylist()
    first = next((name for name in _METRICS if any(row["metric"] == name for row in rows)), None)
    levels: dict[str, list[float]] = {}
    cells = {}
    for row in rows:
        if row["metric"] == first:
            levels.setdefault(row["evaluate_key"], []).append(row["value"])
            cells[row["evaluate_key"]] = row
    best: dict[tuple[str, str], str] = {}
    for key, values in levels.items():
        group = cells[key]["model"], cells[key]["pruner"]
        if group not in best or _mean(values) < _mean(levels[best[group]]):
            best[group] = key
    models = {model for model, _ in best}
    return {_name(cells[key], len(models) > 1): key for key in best.values()}


def _mean(values: Iterable[float]) -> float:
    """Return the mean, or infinity if a value is not finite."""
    held = list(values)
    return math.fsum(held) / len(held) if all(map(math.isfinite, held)) else math.inf


def _name(row: dict[str, object], with_model: bool) -> str:
    parts = [row["model"]] if with_model else []
    parts.append(row["pruner"])
    if row["pruner"] != "dense":
        unstructured = row["pattern"] == "unstructured"
        parts.append(f"{row['sparsity']:.0%}" if unstructured else row["pattern"])
    if row["calibration"] != "none":
        parts += [row["calibration"], f"seed {row['seed']}"]
    return " ".join(map(str, parts))
