"""Checks that find every mistake in a grid before any stage starts."""

import contextlib
import importlib.util
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from cluster.session import ResourceError
from jobs.declared import resolve
from jobs.grid import StageResources
from jobs.memory import SMALL_GPU_BYTES, reads_by_layer
from jobs.plan import Plan, footprints, machine_bytes
from pipeline.data.corpora import check_corpus
from pipeline.data.prefixes import parts_in_turn, prefix_corpora, prefix_sources
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.environment import check_environment
from pipeline.errors import InputError
from pipeline.pruning.allocation import LayerTarget, allocate
from pipeline.scoring.banned_words import read_words
from pipeline.specs import (
    Corpus,
    CorpusMixture,
    DescribeSpec,
    DrawSpec,
    EvaluateSpec,
    FileCorpus,
    FilterSpec,
    GenerateSpec,
    HubCorpus,
    HubModel,
    Model,
    Pattern,
    PretrainSpec,
    PruneSpec,
    ScoreSpec,
    StageSpec,
    TestbedCorpus,
    Uniform,
    Vllm,
    WindowsSpec,
    dense_model,
    dropped,
    generator_of,
)
from pipeline.testbed.world import check_mixture

logger = logging.getLogger(__name__)

_TOKENIZER_FIELDS = {"world", "mixture", "vocab_size", "seed"}
"""Fields of a testbed model that its tokenizer depends on."""


def check_plan(plan: Plan) -> list[str]:
    """Check everything that a plan reads: models, tokenizers, corpora, tasks.

    Returns:
        Warnings, and what could not be checked, such as a hub out of reach.

    Raises:
        InputError: at the first mistake, naming field, value and remedy.
    """
    check_environment()
    resolve(plan.grid, plan.cells.values())
    notes: dict[str, None] = {}
    vocabularies: dict[str, Any] = {}
    configs = {
        name: _config(name, model, notes, vocabularies) for name, model in plan.grid.models.items()
    }
    names = {_json(model): name for name, model in plan.grid.models.items()}
    known = {**CORPUS_PRESETS, **plan.grid.corpora}
    corpora = {_json(corpus): name for name, corpus in known.items()}

    sizes: dict[str, Sequence[int]] = {}
    demands: dict[tuple[str, int, int, bool, str], Corpus] = {}
    chats: dict[tuple[str, str], object] = {}
    lists: set[str] = set()
    for spec in plan.specs.values():
        for model, seqlen in _lengths(spec):
            name = names[_json(dense_model(model))]
            _check_length(name, configs[name], seqlen)
        if isinstance(spec, GenerateSpec | EvaluateSpec) and isinstance(spec.backend, Vllm):
            name = names[_json(dense_model(spec.model))]
            _check_vllm(plan, spec.kind, name, configs[name], spec.backend)
            longest = spec.seqlen if isinstance(spec, GenerateSpec) else None
            _check_vllm_positions(name, configs[name], longest)
        if isinstance(spec, GenerateSpec) and spec.prompt == "chat":
            chats[names[_json(dense_model(spec.model))], "prompt"] = "chat"
        if isinstance(spec, EvaluateSpec) and spec.chat_template:
            chats[names[_json(dense_model(spec.model))], "evaluate.chat_template"] = True
        for field, meeting in _meetings(spec):
            name, reader, writer = (names[_json(dense_model(each))] for each in meeting)
            _check_vocabularies(field, name, reader, writer, vocabularies)
        if isinstance(spec, FilterSpec) and spec.banned_words is not None:
            lists.add(spec.banned_words.path)
        if isinstance(spec, PruneSpec) and spec.pattern is not None:
            name = names[_json(dense_model(spec.model))]
            _check_pattern(name, configs[name], spec.pattern)
        if isinstance(spec, PruneSpec):
            name = names[_json(dense_model(spec.model))]
            if name not in sizes:  # fails for models that cannot be pruned
                sizes[name] = _layer_sizes(name, configs[name], dense_model(spec.model))
        if isinstance(spec, PruneSpec) and spec.allocation != Uniform():
            _check_allocation(name, sizes[name], spec)
        for corpus, nsamples, seqlen, joined, asked_as in _readings(spec):
            demands[corpora[_json(corpus)], nsamples, seqlen, joined, asked_as] = corpus
    for (name, nsamples, seqlen, joined, asked_as), corpus in demands.items():
        with _at(f"corpora.{name}"):
            note = check_corpus(corpus, nsamples, seqlen, joined=joined, asked_as=asked_as)
        if note is not None:
            notes[f"corpora.{name}: {note}"] = None
    for note in _overlaps(plan):
        notes[note] = None
    for (name, field), value in sorted(chats.items()):
        _check_chat(name, plan.grid.models[name], configs[name], field, value)
    for path in sorted(lists):
        read_words(path)
    _check_tasks(plan)
    for note in _check_memory(plan):
        notes[note] = None
    return list(notes)


def _json(value: Model | Corpus) -> str:
    return value.model_dump_json()


# ----------------------------------------------------------------------------------------- models


def _config(name: str, model: Model, notes: dict[str, None], vocabularies: dict[str, Any]) -> Any:
    """Return what is known of a model: the testbed's spec, a configuration, or None if the hub is
    out of reach. Its vocabulary is added to `vocabularies`; for the testbed, its tokenizer's
    fields."""
    if isinstance(model, PretrainSpec):
        with _at(f"models.{name}"):
            check_mixture(model.mixture)
        vocabularies[name] = model.model_dump(include=_TOKENIZER_FIELDS)
        return model
    assert not isinstance(model, PruneSpec)
    from pipeline.models.inspection import inspect_model
    from pipeline.models.vocabulary import Vocabulary, embedding_rows
    from pipeline.models.weight_files import short_list

    with _at(f"models.{name}"):
        found = inspect_model(model)
    if found is None:
        notes[f"models.{name} was not checked: the hub is out of reach"] = None
        return None
    if found.unexpected_tensors:
        unused = short_list(found.unexpected_tensors)
        notes[f"models.{name}: the model has no use for some tensors: {unused}"] = None
    if isinstance(model, HubModel) and model.revision == "main":
        notes[f"models.{name}.revision is no commit: a change on the hub will go unnoticed"] = None
    rows = embedding_rows(found.config)
    vocabularies[name] = Vocabulary(name, found.tokenizer.get_vocab(), rows)
    return found.config


def _check_vocabularies(
    field: str, name: str, reader: str, writer: str, vocabularies: dict[str, Any]
) -> None:
    """Check that a model can read what another one wrote, if both are known.

    A testbed model's tokenizer is trained with it, so fields of its spec are compared.
    """
    ours, theirs = vocabularies.get(reader), vocabularies.get(writer)
    if reader == writer or ours is None or theirs is None:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours != theirs:
            fields = ", ".join(sorted(_TOKENIZER_FIELDS))
            remedy = f"{reader} would read token ids of {writer}, which has another tokenizer: "
            raise InputError(field, name, f"{remedy}give both the same {fields}")
    elif not isinstance(ours, dict) and not isinstance(theirs, dict):
        from pipeline.models.vocabulary import check_shared

        check_shared(field, name, ours, theirs)


@contextlib.contextmanager
def _at(field: str) -> Iterator[None]:
    """Name the grid's field in mistakes that are found in it."""
    try:
        yield
    except InputError as error:
        raise InputError(field, error.value, error.remedy) from error


def _check_length(name: str, config: Any, seqlen: int) -> None:
    longest = (
        config.seqlen
        if isinstance(config, PretrainSpec)
        else getattr(config, "max_position_embeddings", None)
    )
    if longest is not None and seqlen > longest:
        raise InputError(
            "seqlen", seqlen, f"model {name} takes at most {longest} tokens; lower seqlen"
        )


def _check_pattern(name: str, config: Any, pattern: str) -> None:
    group = Pattern.parse(pattern).group
    for field in ("hidden_size", "intermediate_size"):
        width = getattr(config, field, None)
        if isinstance(width, int) and width % group:
            raise InputError(
                "sparsity",
                pattern,
                f"{field} {width} of model {name} is no multiple of {group}; take another pattern",
            )


def _check_vllm(plan: Plan, stage: str, name: str, config: Any, engine: Vllm) -> None:
    if not importlib.util.find_spec("vllm"):
        remedy = "vLLM is not installed here: install calprune[vllm], or set backend: transformers"
        raise InputError("backend", "vllm", remedy)
    heads = _heads(config)
    if heads is not None and heads % engine.tensor_parallel_size:
        remedy = f"model {name} has {heads} attention heads: take a number that divides them"
        raise InputError("backend.tensor_parallel_size", engine.tensor_parallel_size, remedy)
    layers = getattr(config, "num_layers", getattr(config, "num_hidden_layers", None))
    if layers is not None and engine.pipeline_parallel_size > layers:
        remedy = f"model {name} has {layers} layers: take at most that"
        raise InputError("backend.pipeline_parallel_size", engine.pipeline_parallel_size, remedy)
    asked = plan.grid.resources.get(stage, StageResources())
    if engine.gpus > 1 and asked.gpus != engine.gpus:
        remedy = f"an engine of the grid spreads over {engine.gpus} GPUs: set it to {engine.gpus}"
        raise InputError(f"resources.{stage}.gpus", asked.gpus, remedy)
    if 0 < asked.gpus < engine.gpu_memory_utilization:
        remedy = (
            f"resources.{stage}.gpus gives an engine {asked.gpus:g} of a GPU: "
            "lower it to at most that"
        )
        raise InputError("backend.gpu_memory_utilization", engine.gpu_memory_utilization, remedy)


def _check_vllm_positions(name: str, config: Any, longest: int | None) -> None:
    """Check that vLLM reads texts of up to `longest` tokens, or any length, as transformers does:
    it has one set of rotary frequencies, for the longest text that an engine takes."""
    if config is None or isinstance(config, PretrainSpec):
        return
    from pipeline.models.positions import length_dependence

    switches, beyond = length_dependence(config)
    if beyond is not None and beyond == getattr(config, "max_position_embeddings", None):
        switches = (0,)  # dynamic NTK scaling, which vLLM applies to short texts too
    if switches and (longest is None or longest > min(switches)):
        remedy = f"positions of model {name} depend on a text's length, but not in vLLM: "
        raise InputError("backend", "vllm", remedy + "set backend: transformers")


def _check_chat(name: str, model: Model, config: Any, field: str, value: object) -> None:
    if config is None:  # out of reach
        return
    if isinstance(model, PretrainSpec):
        raise InputError(field, value, f"model {name} is no chat model: take another one")
    from pipeline.models.chat import check_chat_template
    from pipeline.models.loading import load_tokenizer

    try:
        check_chat_template(load_tokenizer(model, {}), field, value)
    except InputError as error:
        raise InputError(error.field, error.value, f"model {name}: {error.remedy}") from error


def _heads(config: Any) -> int | None:
    if isinstance(config, PretrainSpec):
        return config.hidden_size // config.head_dim
    return getattr(config, "num_attention_heads", None)


def _layer_sizes(name: str, config: Any, model: Model) -> Sequence[int]:
    """Return the weights of each decoder layer, up to a factor; none if the model is unknown."""
    if config is None:
        return []
    if isinstance(config, PretrainSpec):
        return [1] * config.num_layers
    from pipeline.models.inspection import weightless_model
    from pipeline.pruning.walk import layer_sizes

    with _at(f"models.{name}"):
        return layer_sizes(weightless_model(config, model))


def _check_allocation(name: str, sizes: Sequence[int], spec: PruneSpec) -> None:
    if not sizes:
        return
    alike = [0.0] * len(sizes)  # any ratios will do: the real ones come later
    try:
        target = LayerTarget.parse(spec.sparsity, spec.pattern)
        allocate(spec.allocation, target, sizes, alike)
    except InputError as error:
        raise InputError(error.field, error.value, f"model {name}: {error.remedy}") from error


def _meetings(spec: StageSpec) -> Iterator[tuple[str, tuple[Model, Model, Model]]]:
    """Yield where a model reads token ids that another one wrote: the grid's field, and the model
    that it names, the reader, the writer."""
    match spec:
        case WindowsSpec(source=GenerateSpec() | FilterSpec() as source):
            writer = generator_of(source)
            yield "generator", (writer, spec.model, writer)
        case ScoreSpec():
            yield "scorer", (spec.model, spec.model, spec.samples.model)
        case PruneSpec(calibration=WindowsSpec() as calibration):
            yield "calibration", (calibration.model, spec.model, calibration.model)
        case DescribeSpec():
            yield "describe", (spec.model, spec.model, spec.calibration.model)


def _lengths(spec: StageSpec) -> Iterator[tuple[Model, int]]:
    match spec:
        case WindowsSpec() | GenerateSpec() | DrawSpec():
            yield spec.model, spec.seqlen
        case ScoreSpec():
            yield spec.model, spec.samples.seqlen
        case EvaluateSpec():
            yield from ((spec.model, entry.seqlen) for entry in spec.perplexity)


# ------------------------------------------------------------------------------- corpora and tasks


def _readings(spec: StageSpec) -> Iterator[tuple[Corpus, int, int, bool, str]]:
    """Yield corpus, documents, tokens of each, whether the tokens may be spread over documents, and
    the field that asks for so many."""
    match spec:
        case WindowsSpec(
            source=CorpusMixture() | HubCorpus() | FileCorpus() | TestbedCorpus() as source
        ):
            for corpus, count in _parts(source, spec.nsamples):
                yield corpus, count, spec.seqlen, spec.packing == "concat", "nsamples"
        case DrawSpec():
            for corpus, count in _parts(spec.source, spec.num_samples):
                yield corpus, count, spec.seqlen, False, "pool"
        case GenerateSpec(prefix_tokens=tokens) if tokens > 0:
            for name, count in Counter(prefix_sources(spec)).items():
                yield prefix_corpora(spec)[name], count, tokens, False, "nsamples"
        case EvaluateSpec():
            for entry in spec.perplexity:
                tokens = 1 if entry.unit == "text" else entry.seqlen
                yield entry.corpus, 1, tokens, True, "nsamples"


def _parts(source: Corpus | CorpusMixture, count: int) -> Iterator[tuple[Corpus, int]]:
    """Yield each corpus of a source with its number of `count` texts."""
    if not isinstance(source, CorpusMixture):
        yield source, count
        return
    for part, own in Counter(parts_in_turn(source, count)).items():
        yield source.parts[part].corpus, own


def _overlaps(plan: Plan) -> Iterator[str]:
    """Yield a warning for each set with more windows than the samples left can fill.

    Raises:
        InputError: if each window needs its own text.
    """
    for key, cell in plan.cells.items():
        spec = plan.specs[key]
        assert isinstance(spec, EvaluateSpec)
        calibration = spec.model.calibration if isinstance(spec.model, PruneSpec) else None
        if calibration is None or not isinstance(calibration.source, FilterSpec):
            continue
        samples = calibration.source.scores.samples
        share = calibration.source.drop_fraction
        texts = samples.num_samples - dropped(samples.num_samples, share)
        if texts < calibration.nsamples:
            asked = f"{calibration.nsamples} windows of {calibration.seqlen} tokens"
            if isinstance(samples, DrawSpec):
                remedy = (
                    f"drop_fraction {share:g} leaves {texts} samples, too few for {asked}: raise "
                    "pool, or lower drop_fraction or nsamples"
                )
                field = f"calibrations.{cell.calibration}.pool"
                raise InputError(field, samples.num_samples, remedy)
            if calibration.packing == "sample":
                remedy = f"too few for {asked}, each of a text: raise num_samples or lower nsamples"
                raise InputError(f"calibrations.{cell.calibration}", f"{texts} texts kept", remedy)
            yield (
                f"calibrations.{cell.calibration}: {asked} will overlap: at most {texts} texts of "
                "that length are kept; raise num_samples or lower nsamples"
            )


def _check_tasks(plan: Plan) -> None:
    from pipeline.evaluation.tasks import check_tasks, generative_tasks, missing_tasks

    evaluation = plan.grid.evaluate
    names = [task.name for task in evaluation.all_tasks()]
    missing = missing_tasks(names, evaluation.folder)
    if missing:
        suites = [
            use.name
            for use in evaluation.suites
            if any(entry.name == missing[0] for entry in use.suite.tasks)
        ]
        raise InputError(
            f"evaluate.suites.{suites[0]}" if suites else "evaluate.tasks",
            missing[0],
            f"neither lm-eval {metadata.version('lm-eval')} nor the task folder has it; "
            "`lm-eval ls tasks` lists the names",
        )
    check_tasks(names, evaluation.folder)
    for key, spec in plan.specs.items():
        if not isinstance(spec, EvaluateSpec) or isinstance(spec.backend, Vllm):
            continue
        why = reads_by_layer(spec, plan.sizes, plan.graph[key].resources)
        writing = [] if why is None else generative_tasks(names, evaluation.folder)
        if writing:
            remedy = f"generates, for which a model must be in memory, and {why}"
            remedy += ": take evaluate.backend vllm, raise memory_bytes, or drop the task"
            raise InputError("evaluate.tasks", writing[0], remedy)


# ------------------------------------------------------------------------------------------ memory

GPU_BYTES = {
    "T4": 16e9,
    "V100": 32e9,
    "A10G": 24e9,
    "L4": 24e9,
    "L40S": 48e9,
    "A100": 80e9,
    "A100-40G": 40e9,
    "A100-80G": 80e9,
    "H100": 80e9,
    "H200": 141e9,
    "B200": 192e9,
}
"""Memory of a GPU by Ray's name of its type; the largest of those with this name."""

_REMEDIES = {
    "generate": "take backend vllm with a larger tensor_parallel_size, or a larger node",
    "prune": "take a larger one, or fewer experts: pruning holds one decoder layer already",
    "outliers": "take a larger one: it holds one decoder layer already",
}
_READING_REMEDY = "take a larger one: it holds two decoder layers already"


def _check_memory(plan: Plan) -> Iterator[str]:
    """Yield a warning for each kind of stage without a GPU that reserves less than it takes.

    Raises:
        InputError: if that is less than the weights that it holds at a time.
    """
    for (kind, name), found in footprints(plan, plan.specs, None, machine_bytes()).items():
        asked = plan.grid.resources.get(kind, StageResources())
        if asked.memory_bytes is None or asked.gpus:
            continue
        field, peak = f"resources.{kind}.memory_bytes", found.peaks[1]
        if found.weights > asked.memory_bytes:
            how = "weights that it holds at a time" if found.streamed else "weights"
            remedy = f"{name} has {_gigabytes(found.weights)} of {how}: raise it, or give it a GPU"
            raise InputError(field, asked.memory_bytes, remedy)
        if peak > asked.memory_bytes:
            yield f"{field}: {asked.memory_bytes}: {name} takes about {_gigabytes(peak)}: raise it"


def check_room(
    plan: Plan, keys: Collection[str], nodes: Sequence[Mapping[str, float]], may_grow: bool
) -> None:
    """Check that some node of a cluster has the memory for each stage; warn where it may not.

    Args:
        keys: of the stages to make.
        nodes: the resources of each node, as Ray names them.
        may_grow: whether nodes may join.

    Raises:
        ResourceError: if the weights alone that a stage holds are more than any node has, and no
            node may join.
    """
    host = max((_host_bytes(node) for node in nodes), default=0.0)
    gpus = [_gpu_bytes(node) for node in nodes if node.get("GPU")]
    known = [size for size in gpus if size is not None]
    gpu = max(known) if gpus and len(known) == len(gpus) else None
    for (kind, name), found in footprints(plan, keys, gpu, host).items():
        of_device, of_host, _ = found.peaks
        where, peak, size = (
            ("GPU", of_device, gpu) if found.device else ("host", of_host, host or None)
        )
        takes = f"resources.{kind}: {name} takes about {_gigabytes(peak)} of {where} memory"
        if size is None:
            if found.device and peak > SMALL_GPU_BYTES:
                logger.warning("%s; the GPUs' type and memory are unknown", takes)
            continue
        if peak <= size:
            continue
        remedy = _REMEDIES.get(kind, _READING_REMEDY)
        message = f"{takes}, and the largest has {_gigabytes(size)}: {remedy}"
        if found.weights > size and not may_grow:
            raise ResourceError(message)
        logger.warning("%s", message)


def _host_bytes(node: Mapping[str, float]) -> float:
    """Return a node's memory, with the part that Ray keeps for objects."""
    return node.get("memory", 0.0) + node.get("object_store_memory", 0.0)


def _gpu_bytes(node: Mapping[str, float]) -> float | None:
    prefix = "accelerator_type:"
    types = [name.removeprefix(prefix) for name in node if name.startswith(prefix)]
    return GPU_BYTES.get(types[0]) if types else None


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
