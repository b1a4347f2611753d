"""The stages as plain functions, for a notebook: no grid, no store, no Ray.

Each function returns the same as the stage of that name in a grid with the same settings. Settings
are fields of the stage's spec, and a wrong one raises an `InputError` that names it.
"""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.data.draw import as_samples, cut_pool
from pipeline.data.prefixes import read_prefixes
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.data.samples import Sample
from pipeline.data.windows import Cutting, Tokens, cut_corpus, cut_samples
from pipeline.environment import check_environment
from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation.evaluate import check_names, measure_perplexity
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.schemas import MetricRow
from pipeline.evaluation.task_metrics import task_metrics
from pipeline.generation.generate import generate_shard
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.mistakes import explained
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.output_layer import OutputLayer, check_causal
from pipeline.models.vocabulary import check_ids, edge_ids, embedding_rows
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.outliers import count_outliers
from pipeline.pruning.prune import PruneReport, prune_model
from pipeline.pruning.reconstruction import Fit
from pipeline.scoring.filter import reasons_to_drop
from pipeline.scoring.score import STATES, Score, score_samples, score_with_states
from pipeline.specs import (
    OWL,
    Allocation,
    Corpus,
    DrawSpec,
    EvaluateSpec,
    FileCorpus,
    FilterOptions,
    GenerateSpec,
    HubCorpus,
    HubModel,
    LocalModel,
    LocalTasks,
    Pattern,
    PerplexitySpec,
    Pruner,
    ReconstructionOptions,
    Spec,
    TaskSpec,
    TestbedCorpus,
    WindowsSpec,
    data_taker,
)

Texts = str | Sequence[str] | FileCorpus | HubCorpus | TestbedCorpus
"""A path or glob of Parquet, JSON Lines or text files, the name of a corpus preset such as `c4`, a
list of texts, or the spec of a corpus."""

AnySpec = TypeVar("AnySpec", bound=Spec)


class LanguageModel(NamedTuple):
    """A loaded model: `model` and `tokenizer` are those of transformers."""

    model: Any
    tokenizer: Any
    spec: HubModel | LocalModel
    """Where it was loaded from."""


def load(name: str | Path, dtype: str = "bfloat16", **options: Any) -> LanguageModel:
    """Load a causal language model and its tokenizer, on the accelerator if there is one.

    Args:
        name: a checkpoint folder, or a model's name on the hub.
        dtype: `float32`, `bfloat16` or `float16`.
        options: further fields of `LocalModel` or `HubModel`, such as `revision`.

    Raises:
        InputError: if there is no such model, its checkpoint is incomplete, or a setting is wrong.
    """
    check_environment()
    spec: HubModel | LocalModel
    if Path(name).is_dir():
        spec = _checked(LocalModel, path=str(name), dtype=dtype, **options)
    else:
        spec = _checked(HubModel, name=str(name), dtype=dtype, **options)
    return LanguageModel(load_model(spec, {}), load_tokenizer(spec, {}), spec)


def generate(model: LanguageModel, prefixes: Texts, **settings: Any) -> list[Sample]:
    """Let a model continue short prefixes of real texts (arXiv 2410.17711, section 5).

    Args:
        prefixes: where prefixes are cut from, one a text.
        settings: fields of `GenerateSpec`: `num_samples`, `seqlen`, `prefix_tokens`, `seed`,
            `temperature`, `top_p` and so on. It runs in this process: `backend` is not among them.

    Raises:
        InputError: if a setting is wrong, or the texts are too few or too short.
        NonFiniteError: if the model's logits are NaN or infinite.
    """
    if "backend" in settings:
        remedy = "generate runs transformers in this process: leave it out, or use a grid for vLLM"
        raise InputError("backend", settings["backend"], remedy)
    with _corpus(prefixes, "prefixes") as corpus:
        spec = _checked(GenerateSpec, model=model.spec, prefixes=corpus, **settings)
        begun = read_prefixes(spec, model.tokenizer)
    engine = TransformersEngine(model.model)
    shards = (
        generate_shard(spec, index, engine, model.tokenizer, begun)
        for index in range(spec.shard_count)
    )
    return list(itertools.chain.from_iterable(shards))


def draw(model: LanguageModel, texts: Texts, **settings: Any) -> list[Sample]:
    """Draw a pool of real text for `filter` to choose from: a stretch of each of several texts.

    Args:
        texts: where they are cut from. To filter within sources, draw from each by itself and give
            `filter` their `sources`.
        settings: fields of `DrawSpec`: `num_samples`, `seqlen`, `seed`.

    Raises:
        InputError: if a setting is wrong, or the texts are too few or too short.
    """
    with _corpus(texts, "texts") as corpus:
        spec = _checked(DrawSpec, source=corpus, model=model.spec, **settings)
        rows = embedding_rows(model.model.config)
        cut = cut_pool(spec, model.tokenizer, rows, "num_samples")
    return as_samples(cut, model.tokenizer)


def score(
    model: LanguageModel, samples: Sequence[Sample], include_prefix: bool = False
) -> list[Score]:
    """Score each sample: perplexity, Min-K%, Min-K%++, loss by quarter, distinct n-grams.

    Args:
        include_prefix: score the given tokens too.

    Raises:
        NonFiniteError: if a score is NaN or infinite.
    """
    check_causal(model.model)
    return score_samples(
        model.model,
        [sample.token_ids for sample in samples],
        [sample.prefix_tokens for sample in samples],
        include_prefix=include_prefix,
        name=lambda place: f"sample {samples[place].sample_id}",
    )


def hidden_states(
    model: LanguageModel, samples: Sequence[Sample], include_prefix: bool = False
) -> list[list[float] | None]:
    """Take each sample's mean hidden states over the scored tokens, for `filter`.

    It costs what `score` does; in a grid both come from one pass.

    Args:
        include_prefix: count the given tokens too.

    Returns:
        [layers * 128] each; None for a sample without a scored token.

    Raises:
        NonFiniteError: if the model gives NaN or infinity.
    """
    _, states = score_with_states(
        model.model,
        [sample.token_ids for sample in samples],
        [sample.prefix_tokens for sample in samples],
        include_prefix=include_prefix,
        name=lambda place: f"sample {samples[place].sample_id}",
    )
    return states


def filter(
    samples: Sequence[Sample],
    scores: Sequence[Score],
    drop_fraction: float = 0.0,
    banned_words: Sequence[str] = (),
    hidden_states: Sequence[list[float] | None] | None = None,
    sources: Sequence[str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[Sample]:
    """Drop a share of the samples by a rule, by default those of highest perplexity.

    Args:
        scores: of each sample.
        drop_fraction: share that the rule drops; the paper drops 0.2.
        banned_words: words and phrases that no sample may hold, in any letter case.
        hidden_states: of each sample, for `drop_by="cola"` and `within="cluster"`.
        sources: a name for each sample, for `within="source"`.
        seed: for rules that draw at random.
        settings: the other fields of `FilterOptions`: `drop_by`, `within`, `drop_duplicates`,
            `near_duplicate_similarity`.

    Raises:
        InputError: if a setting is wrong, no sample is left, there is not one score, state or
            source a sample, or the samples differ too little for the rule.
        NonFiniteError: if a perplexity is NaN or infinite.
    """
    given = {"scores": scores, "hidden_states": hidden_states, "sources": sources}
    for name, values in given.items():
        if values is not None and len(values) != len(samples):
            raise InputError(name, len(values), f"there are {len(samples)} samples: give one each")
    options = _checked(FilterOptions, drop_fraction=drop_fraction, **settings)
    texts = {
        "text": [sample.text for sample in samples],
        "token_ids": [sample.token_ids for sample in samples],
    }
    measured = {
        "sample_id": pa.array([sample.sample_id for sample in samples], pa.int64()),
        "perplexity": pa.array([each.perplexity for each in scores], pa.float64()),
        "min_k_plus_plus": pa.array([each.min_k_plus_plus for each in scores], pa.float64()),
    }
    if hidden_states is not None:
        measured[STATES.name] = pa.array(hidden_states, STATES.type)
    if sources is not None:
        texts["source"] = list(sources)
    reasons = reasons_to_drop(pa.table(texts), pa.table(measured), options, banned_words, seed)
    return [sample for sample, reason in zip(samples, reasons, strict=True) if reason == ""]


def windows(
    model: LanguageModel, source: Texts | Sequence[Sample], **settings: Any
) -> torch.Tensor:
    """Cut a calibration set, token ids [nsamples, seqlen].

    Args:
        source: real texts, or samples with the ids of this tokenizer.
        settings: `nsamples`, `seqlen`, `packing` and `seed` of `WindowsSpec`.

    Raises:
        InputError: if a setting is wrong, or the texts are too few or too short.
    """
    samples = _samples(source)
    text = FileCorpus(path="samples") if samples else source  # of samples only the rest is checked
    with _corpus(text, "source") as corpus:
        spec = _checked(WindowsSpec, source=corpus, model=model.spec, **settings)
        how = Cutting.of(spec)
        if samples:
            texts = (
                Tokens(str(each.sample_id), np.array(each.token_ids, np.int32)) for each in samples
            )
            edges = edge_ids(model.model.generation_config, model.tokenizer)
            cut = cut_samples(texts, edges, how)
        else:
            cut = cut_corpus(corpus, model.tokenizer, how)
    ids = np.stack([window.ids for window in cut.windows])
    check_ids(ids, embedding_rows(model.model.config))
    return torch.from_numpy(ids).long()


def prune(
    model: LanguageModel,
    windows: torch.Tensor | None = None,
    pruner: str | Mapping[str, Any] = "wanda",
    sparsity: float | str = 0.5,
    allocation: str | Mapping[str, Any] = "uniform",
    reconstruction: Mapping[str, Any] | None = None,
) -> PruneReport:
    """Prune a model in place.

    Args:
        windows: the calibration set, token ids [nsamples, seqlen]; leave it out for pruners
            without data, such as magnitude.
        pruner: its name, or its name and options: `{"name": "sparsegpt", "damping": 0.02}`.
        sparsity: share of zeros, or a pattern such as `"2:4"`.
        allocation: `uniform`, `owl`, or a name and options.
        reconstruction: fit the kept weights to the windows afterwards, with these options, such as
            `{"epochs": 5}`; `{}` takes the defaults, and None leaves the weights to the pruner.

    Raises:
        InputError: if a setting is wrong, the calibration set is missing, unused or does not suit
            the model, or the model is of a form that cannot be pruned.
        NonFiniteError: if a weight or an activation is NaN or infinite.
    """
    chosen: Pruner = _named("pruner", TypeAdapter(Pruner), pruner)
    spread: Allocation = _named("allocation", TypeAdapter(Allocation), allocation)
    try:
        pattern = Pattern.parse(sparsity) if isinstance(sparsity, str) else None
    except ValueError as error:
        raise InputError("sparsity", sparsity, str(error)) from error
    share = sparsity if pattern is None else pattern.sparsity
    fitted = None if reconstruction is None else _checked(ReconstructionOptions, **reconstruction)
    needs_data = data_taker(chosen, spread, fitted)
    if needs_data is not None and windows is None:
        raise InputError("windows", None, f"{needs_data} needs a calibration set")
    if needs_data is None and windows is not None:
        shape = list(windows.shape)
        raise InputError("windows", shape, f"pruner {chosen.name} takes no data: leave windows out")
    ratios = None
    if isinstance(spread, OWL) and windows is not None:
        ratios = [each.ratio for each in count_outliers(model.model, windows, spread.threshold)]
    return prune_model(
        model.model,
        windows if chosen.calibrated else None,
        chosen,
        ModelTarget(LayerTarget(float(share), pattern), spread, ratios),
        fit=None if fitted is None or windows is None else Fit(fitted, windows),
    )


def evaluate(
    model: LanguageModel,
    perplexity: Mapping[str, Texts] | None = None,
    tasks: Sequence[str | TaskSpec] = (),
    seqlen: int = 2048,
    max_windows: int | None = 256,
    task_folder: str | Path | None = None,
    dense: LanguageModel | None = None,
) -> list[MetricRow]:
    """Measure a model: perplexity and bits per byte on texts, and lm-eval tasks.

    Args:
        perplexity: texts by their names in the results.
        tasks: names of lm-eval tasks, or `TaskSpec`s with examples and limits.
        seqlen: tokens of a window of a perplexity.
        max_windows: the most windows of each; None takes all.
        task_folder: a folder of further tasks.
        dense: the model before pruning, loaded once more; each text then also has its KL divergence
            from the dense model and its changes of the most likely token.

    Raises:
        InputError: if a setting is wrong, a text is too short, or there is no such task.
        NonFiniteError: if the model gives NaN or infinity.
    """
    asked = [TaskSpec(name=task) if isinstance(task, str) else task for task in tasks]
    check_causal(model.model)
    found: list[MetricRow] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measured = [
            _checked(
                PerplexitySpec,
                name=name,
                corpus=stack.enter_context(_corpus(texts, f"perplexity.{name}")),
                seqlen=seqlen,
                max_windows=max_windows,
            )
            for name, texts in (perplexity or {}).items()
        ]
        folder = None if task_folder is None else LocalTasks(path=str(task_folder))
        spec = _checked(
            EvaluateSpec,
            model=model.spec,
            perplexity=tuple(measured),
            tasks=tuple(asked),
            task_folder=folder,
        )
        check_names(spec)
        answers = FinishedAnswers(b"", scratch)
        for each in measured:
            found += measure_perplexity(
                OutputLayer(model.model),
                model.tokenizer,
                each,
                spec.batch_tokens,
                answers,
                None if dense is None else OutputLayer(dense.model),
            ).metrics
        if asked:
            from pipeline.evaluation.sharing_lm import SharingLM  # lm-eval takes seconds to import

            lm = SharingLM(model.model, model.tokenizer, spec.batch_tokens, answers)
            found += task_metrics(lm, asked, None if folder is None else Path(folder.path)).metrics
    return found


def _checked(kind: type[AnySpec], **values: Any) -> AnySpec:
    try:
        return kind(**values)
    except ValidationError as error:
        raise explained(error, (), values) from error


def _named(field: str, kind: TypeAdapter[Any], value: object) -> Any:
    """Read a choice from its name, or from its name and options."""
    content = {"name": value} if isinstance(value, str) else value
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        raise explained(error, (field,), content) from error


@contextlib.contextmanager
def _corpus(texts: Any, field: str) -> Iterator[Corpus]:
    """Yield the corpus that a user means; texts in memory go to a temporary file."""
    match texts:
        case FileCorpus() | HubCorpus() | TestbedCorpus():
            yield texts
        case str() if texts in CORPUS_PRESETS:
            yield CORPUS_PRESETS[texts]
        case str() | Path():
            if Path(texts).suffix == "":
                known = did_you_mean(str(texts), CORPUS_PRESETS)
                raise InputError(field, str(texts), f"is neither a file nor a preset; {known}")
            yield FileCorpus(path=str(texts))
        case [*_] if texts and all(isinstance(text, str) for text in texts):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "texts.jsonl")
                lines = (json.dumps({"text": text}) + "\n" for text in texts)
                path.write_text("".join(lines), encoding="utf-8")
                yield FileCorpus(path=str(path))
        case _:
            raise InputError(field, texts, "give a path, a preset's name, or a list of texts")


def _samples(source: Any) -> list[Sample]:
    """Return the source if it is samples, or an empty list."""
    if isinstance(source, Sequence) and source and all(isinstance(x, Sample) for x in source):
        return list(source)
    return []
