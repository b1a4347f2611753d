"""The memory and the temporary disk that a stage takes: a stated model (docs/scale.md).

The facts of a model are the shapes of its tensors, from the headers of its checkpoint. Peaks are
those of one process; on a CPU, device and host are one.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.graph import Resources
from jobs.cost import MANY_WINDOWS, MASK_BYTES, WEIGHT_BYTES, ModelSize, task_tokens
from jobs.memory import ReadsTexts, is_streamed
from jobs.sizes import TensorShapes
from pipeline.models.memory import (
    ACCELERATOR_BATCH_TOKENS,
    ACCELERATOR_LOGITS,
    BATCH_TOKENS,
    DEVICE_HIDDEN_BYTES,
    HOST_HIDDEN_BYTES,
    LAYER_LOGITS,
    PART_LOGITS,
)
from pipeline.specs import (
    SCORE_BATCH_TOKENS,
    DescribeSpec,
    DSnoT,
    EvaluateSpec,
    GenerateSpec,
    Magnitude,
    OutliersSpec,
    PretrainSpec,
    Pruner,
    PruneSpec,
    ScoreSpec,
    ShardedSpec,
    ShardSpec,
    SparseGPT,
    StageSpec,
    Vllm,
    WindowsSpec,
)

LIBRARY_BYTES = 0.45e9
"""Host memory of a worker that has imported torch and transformers, without mapped files."""

DEVICE_LIBRARY_BYTES = 1.0e9
"""GPU memory of the CUDA context and its libraries' workspaces. Assumed, not measured."""

FREE_PAGES = 0.5
"""Free memory that the C library keeps on a CPU between the blocks of batches, in times of the
activations. Measured (`benchmarks.footprint`), not derived."""

SCORE_COPIES = 4
"""Tensors in float32 of as many numbers that scoring holds."""

WEIGHT_PARTS = ("outside the layers", "decoder layers", "weights")
"""Parts of a footprint that are weights where they compute."""

SHARED_INPUTS = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
"""Matrices that read the same input, by the first part of their names. Of models with other names
each matrix counts with an input of its own."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a decoder layer."""

    input: str
    """Matrices of one input have the same."""

    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Shape:
    """What the memory of a model depends on."""

    layers: int
    layer_weights: int
    """Parameters of the largest decoder layer."""
    outside_weights: int
    """Parameters outside the decoder layers."""
    weights: int
    """All parameters."""
    vocabulary: int
    hidden: int
    matrices: tuple[Matrix, ...]
    """Those of the largest decoder layer; experts one by one."""

    @property
    def widest(self) -> int:
        """The widest input of a matrix: the width of the MLP."""
        return max(matrix.columns for matrix in self.matrices)

    @property
    def size(self) -> ModelSize:
        """Numbers of parameters."""
        inside = self.weights - self.outside_weights
        return ModelSize(self.weights, inside, self.vocabulary * self.hidden)

    @property
    def inputs(self) -> dict[str, int]:
        """Width of each input that matrices of a layer read."""
        return {matrix.input: matrix.columns for matrix in self.matrices}


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak, by part.

    On a CPU the parts of the device are among those of the host.
    """

    device: Mapping[str, float] = field(default_factory=dict)
    """On each GPU; empty for a stage on a CPU."""
    host: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)
    """Temporary files, and the artifact before it is stored."""
    streamed: bool = False
    """Whether the model is read one decoder layer at a time."""

    @property
    def peaks(self) -> tuple[float, float, float]:
        """Bytes on the device, in the host and on disk."""
        return sum(self.device.values()), sum(self.host.values()), sum(self.disk.values())

    @property
    def weights(self) -> float:
        """Bytes of weights that must be in memory where the stage computes: a lower bound."""
        parts = self.device or self.host
        return sum(parts.get(name, 0.0) for name in WEIGHT_PARTS)


def shape_of(tensors: TensorShapes) -> Shape | None:
    """Return the shape of a model whose decoder layers are numbered in its tensors' names.

    The decoder is the list of modules with the most weights. None if there is no such list, or no
    embedding outside it.
    """
    lists: defaultdict[str, defaultdict[int, dict[str, tuple[int, ...]]]]
    lists = defaultdict(lambda: defaultdict(dict))
    for name, shape in tensors.items():
        found = re.match(r"(.*?)(\d+)\.(.+)", name)
        if found:
            lists[found[1]][int(found[2])][found[3]] = shape
    if not lists:
        return None
    layers = max(lists.values(), key=lambda each: sum(_weights(layer) for layer in each.values()))
    largest = max(layers.values(), key=_weights)
    weights, inside = _weights(tensors), sum(map(_weights, layers.values()))
    decoder = next(name for name, each in lists.items() if each is layers)
    outside = {
        shape
        for name, shape in tensors.items()
        if not re.match(rf"{re.escape(decoder)}\d+\.", name)
    }
    embeddings = max((each for each in outside if len(each) == 2), key=math.prod, default=None)
    matrices = tuple(_matrices(largest))
    if embeddings is None or not matrices:
        return None
    return Shape(
        layers=len(layers),
        layer_weights=_weights(largest),
        outside_weights=weights - inside,
        weights=weights,
        vocabulary=embeddings[0],
        hidden=embeddings[1],
        matrices=matrices,
    )


def _weights(tensors: TensorShapes) -> int:
    return sum(map(math.prod, tensors.values()))


def _matrices(layer: TensorShapes) -> list[Matrix]:
    found = []
    for name, shape in layer.items():
        if len(shape) < 2 or min(shape[-2:]) == 1:
            continue
        path, _, _ = name.rpartition(".")
        module, _, last = path.rpartition(".")
        shared = SHARED_INPUTS.get(last.partition("_")[0])
        own = f"{module}.{shared}" if shared else name
        found += [
            Matrix(own if number == 0 else f"{own}.{number}", shape[-2], shape[-1])
            for number in range(math.prod(shape[:-2]))
        ]
    return found


def llama_shape(
    layers: int, hidden: int, mlp: int, key_width: int, vocabulary: int, *, tied: bool
) -> Shape:
    """Return the shape of a Llama.

    Args:
        key_width: width of all key heads together.
        tied: whether the output layer is the embedding.
    """
    rows = {"q": hidden, "k": key_width, "v": key_width, "o": hidden, "gate": mlp, "up": mlp}
    layer = {f"{name}_proj.weight": (each, hidden) for name, each in rows.items()}
    norms = {"input_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
    tensors: dict[str, tuple[int, ...]] = {
        f"layers.{number}.{name}": shape
        for number in range(layers)
        for name, shape in {**layer, **norms, "down_proj.weight": (hidden, mlp)}.items()
    }
    tensors |= {"embedding.weight": (vocabulary, hidden), "norm.weight": (hidden,)}
    if not tied:
        tensors["head.weight"] = (vocabulary, hidden)
    found = shape_of(tensors)
    assert found is not None
    return found


def pretrained_shape(spec: PretrainSpec) -> Shape:
    """Return the shape of a model of the testbed."""
    return llama_shape(
        spec.num_layers,
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_key_value_heads * spec.head_dim,
        spec.vocab_size,
        tied=True,
    )


def footprint(
    stage: StageSpec,
    shape: Shape,
    resources: Resources,
    memory: float | None,
    hidden_bytes: Mapping[str, int] | None = None,
) -> Footprint | None:
    """Return what a stage takes; None if it holds no model, or trains one.

    Args:
        shape: of its model.
        memory: bytes of its GPU, or of the host if it has none; None takes a GPU that is too small
            for a model that is not small.
        hidden_bytes: the budgets `device_hidden_bytes` and `host_hidden_bytes`, if they are set.
    """
    spec = stage.of if isinstance(stage, ShardSpec) else stage
    if isinstance(stage, ShardedSpec | PretrainSpec):
        return None
    given = hidden_bytes or {}
    budgets = (
        given.get("device_hidden_bytes", DEVICE_HIDDEN_BYTES),
        given.get("host_hidden_bytes", HOST_HIDDEN_BYTES),
    )
    match spec:
        case PruneSpec() | OutliersSpec():
            return _pruning(spec, shape, resources, budgets)
        case ScoreSpec() | DescribeSpec() | EvaluateSpec():
            return _reading(spec, shape, resources, memory, budgets)
        case GenerateSpec():
            return _generation(spec, shape, resources)
        case _:
            return None


FITTED_STATES = 4
"""Hidden states of a reconstruction: those below a layer, the input of a part, and the targets of
both."""

FITTED_BYTES = 17
"""Bytes of a weight that is fitted: in float32 itself, its gradient and Adam's two moments, and
whether it is kept. Counted for the whole layer, of which a part is at work."""

FITTED_ACTIVATIONS = 2
"""What a step keeps for its gradients, against what a forward pass holds."""


def statistic_bytes(statistics: str, width: int) -> int:
    """Return the bytes of the statistics of an input: a Hessian, or a few vectors."""
    return 4 * width**2 if statistics == "hessian" else 4 * width


def statistics_of(spec: PruneSpec | OutliersSpec) -> str:
    """Return the largest statistic that a pruning needs: `hessian`, `vectors`, or `none`."""
    if isinstance(spec, OutliersSpec):
        return "vectors"
    if _column_matrices(spec.pruner):
        return "hessian"
    return "vectors" if spec.pruner.calibrated else "none"


def _column_matrices(pruner: Pruner) -> int:
    if isinstance(pruner, DSnoT) and pruner.initial == "sparsegpt":
        return SparseGPT.column_matrices
    return pruner.column_matrices


def _pruning(
    spec: PruneSpec | OutliersSpec, shape: Shape, resources: Resources, budgets: tuple[int, int]
) -> Footprint:
    """A walk: a layer with its statistics, the hidden states, and a batch or a matrix at work."""
    each = WEIGHT_BYTES[spec.dtype if isinstance(spec, PruneSpec) else spec.model.dtype]
    gpu = bool(resources.gpus)
    statistics = statistics_of(spec)
    calibration = spec.calibration
    windows = calibration if isinstance(calibration, WindowsSpec) else None
    layers, host = _two_layers(shape, each, gpu)
    parts = {"outside the layers": each * shape.outside_weights, **layers}
    work: dict[str, float] = {"a matrix": _matrix_bytes(spec, shape, each)}
    states = 0.0
    if windows is not None and statistics != "none":
        parts["statistics"] = sum(
            statistic_bytes(statistics, width) for width in shape.inputs.values()
        )
        states = windows.nsamples * windows.seqlen * shape.hidden * each
        batch = ACCELERATOR_BATCH_TOKENS if gpu else BATCH_TOKENS
        tokens = max(windows.seqlen, batch // windows.seqlen * windows.seqlen)
        tokens = min(tokens, windows.nsamples * windows.seqlen)
        exact = 4 * shape.widest * (1 + (each < 4))  # squares, and a copy in float32
        observed = tokens * (each * (shape.widest + 2 * shape.hidden) + exact)
        work["activations"] = max(_activations(tokens, shape, each), observed)
        parts |= _free_pages(work["activations"], gpu)
    artifact = 0.0
    if isinstance(spec, PruneSpec) and spec.pruner.gradients:
        assert windows is not None, "gradients are of the calibration set's output"
        parts["statistics"] += 4 * shape.layer_weights
        step = FITTED_ACTIVATIONS * _activations(windows.seqlen, shape, each)
        work["gradients"] = 8 * shape.layer_weights + step
    if isinstance(spec, PruneSpec) and spec.reconstruction is not None:
        fitted_to = spec.reconstruction.calibration or windows
        assert fitted_to is not None, "the spec says that reconstruction needs a calibration set"
        tokens = fitted_to.nsamples * fitted_to.seqlen
        states += FITTED_STATES * tokens * shape.hidden * each
        step = min(spec.reconstruction.batch_size * fitted_to.seqlen, tokens)
        activations = FITTED_ACTIVATIONS * _activations(step, shape, each)
        work["reconstruction"] = FITTED_BYTES * shape.layer_weights + activations
    if isinstance(spec, PruneSpec):
        artifact = shape.weights * (MASK_BYTES if spec.stores_masks else each)
        work["a matrix"] += shape.layer_weights  # masks of the layer, a byte each
        written = {"a written layer": shape.layer_weights * (1.0 if spec.stores_masks else each)}
        (host if gpu else work).update(written)
    return _placed(parts, work, states, budgets, gpu, host, artifact, streamed=True)


def _two_layers(shape: Shape, each: int, gpu: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Return the parts of a layer at work and the next one, on the device and in its host: for a
    GPU the next one waits in pinned memory, and so does the one at work until it is copied."""
    layer = float(each * shape.layer_weights)
    if gpu:
        return {"decoder layers": layer}, {"decoder layers, read ahead": 2 * layer}
    return {"decoder layers": 2 * layer}, {}


def _matrix_bytes(spec: PruneSpec | OutliersSpec, shape: Shape, each: int) -> float:
    pruner = spec.pruner if isinstance(spec, PruneSpec) else Magnitude()  # scores take as much
    squares = _column_matrices(pruner)
    copy = 4 * (each != 4)
    # The factor's parts are freed, but for one, before the columns are visited.
    return max(
        max(
            4 * squares * matrix.columns**2 + copy * matrix.weights,
            4 * (squares > 0) * matrix.columns**2 + (copy + pruner.matrix_bytes) * matrix.weights,
        )
        for matrix in shape.matrices
    )


def _activations(tokens: int, shape: Shape, each: int) -> float:
    """Bytes of a layer's forward pass at its widest: three tensors of the MLP's width, and four of
    the model's (the residual, its norm, and both in float32 within a norm)."""
    return tokens * each * (3 * shape.widest + 4 * shape.hidden)


def _free_pages(activations: float, gpu: bool) -> dict[str, float]:
    """Return the part of the heap; a model read by layer without a pruning returns each block."""
    return {} if gpu else {"free pages of the heap": FREE_PAGES * activations}


def _reading(
    spec: ReadsTexts,
    shape: Shape,
    resources: Resources,
    memory: float | None,
    budgets: tuple[int, int],
) -> Footprint:
    """Texts through a model, and the logits of a part of them."""
    each = WEIGHT_BYTES[spec.model.dtype]
    gpu = bool(resources.gpus)
    models = 2 if isinstance(spec, EvaluateSpec) and spec.compares else 1
    streamed = is_streamed(spec, shape.weights, memory)
    longest, batch, tokens = _texts(spec)
    if streamed and not gpu:
        batch = min(batch, BATCH_TOKENS)
    batch = min(max(longest, batch // longest * longest), tokens)
    passes: dict[str, float] = {"activations": _activations(batch, shape, each)}
    logits = min(ACCELERATOR_LOGITS if gpu else LAYER_LOGITS, batch * shape.vocabulary)
    scored = min(ACCELERATOR_LOGITS if gpu else PART_LOGITS, logits)
    states = batch * shape.hidden * each * 2
    passes["logits"] = states + models * logits * each + SCORE_COPIES * 4 * scored * models
    parts: dict[str, float] = {"outside the layers": models * each * shape.outside_weights}
    if streamed:
        layers, waiting = _two_layers(shape, each, gpu)
        parts |= layers
        budgets = (models * budgets[0], models * budgets[1])  # each model has its own
        hidden = min(models * tokens * shape.hidden * each, sum(budgets))  # more pass in parts
        return _placed(parts, passes, hidden, budgets, gpu, waiting, 0.0, streamed=True)
    parts["decoder layers"] = models * each * (shape.weights - shape.outside_weights)
    parts |= _free_pages(passes["activations"], gpu)
    waiting = {"the model while it is loaded": each * shape.weights} if gpu else {}
    return _placed(parts, passes, 0.0, budgets, gpu, waiting, 0.0, streamed=False)


def _texts(spec: ReadsTexts) -> tuple[int, int, int]:
    """Return the tokens of the longest text, of a batch, and of all that pass together."""
    match spec:
        case ScoreSpec():
            length = spec.samples.seqlen
            shard = min(spec.samples.shard_size, spec.samples.num_samples)
            return length, SCORE_BATCH_TOKENS, shard * length
        case DescribeSpec():
            windows = spec.calibration
            return windows.seqlen, SCORE_BATCH_TOKENS, windows.nsamples * windows.seqlen
        case EvaluateSpec():
            texts = [
                (entry.seqlen, (entry.max_windows or MANY_WINDOWS) * entry.seqlen)
                for entry in spec.perplexity
            ]
            if spec.tasks and not isinstance(spec.backend, Vllm):
                requests = math.ceil(sum(task_tokens(spec, task) for task in spec.tasks))
                texts.append((min(TASK_TEXT, requests), requests))
            longest = max((length for length, _ in texts), default=1)
            return longest, spec.batch_tokens, max((tokens for _, tokens in texts), default=1)


TASK_TEXT = 1_024
"""Tokens of a task's longest request."""


def _generation(spec: GenerateSpec, shape: Shape, resources: Resources) -> Footprint:
    """A whole model with keys and values, over an engine's GPUs."""
    each = WEIGHT_BYTES[spec.model.dtype]
    gpu = bool(resources.gpus)
    spread = spec.backend.gpus if isinstance(spec.backend, Vllm) else 1
    rows = [matrix.rows for matrix in shape.matrices if matrix.columns == shape.hidden]
    keys = 2 * shape.layers * min(rows, default=shape.hidden)
    samples = 1 if isinstance(spec.backend, Vllm) else min(spec.shard_size, spec.num_samples)
    parts: dict[str, float] = {
        "weights": each * shape.weights / spread,
        "keys and values": samples * spec.seqlen * keys * each / spread,
    }
    work = {"logits": samples * shape.vocabulary * (each + 8)}
    waiting = {"the model while it is loaded": each * shape.weights} if gpu else {}
    return _placed(parts, work, 0.0, (0, 0), gpu, waiting, 0.0, streamed=False)


def _placed(
    parts: Mapping[str, float],
    work: Mapping[str, float],
    states: float,
    budgets: tuple[int, int],
    gpu: bool,
    host: Mapping[str, float],
    artifact: float,
    *,
    streamed: bool,
) -> Footprint:
    """Put the parts on the device; hidden states by their budgets.

    Args:
        work: parts of which only one is held at a time.
        states: bytes of hidden states.
        host: parts that are in host memory though the device is a GPU.
        artifact: bytes of the artifact.
    """
    first = min(states, budgets[0])
    second = min(states - first, budgets[1])
    most = max(work, key=lambda name: work[name])
    device = {**parts, most: work[most], "hidden states": first}
    disk = {"hidden states": states - first - second, "artifact": artifact}
    if gpu:
        device["libraries"] = DEVICE_LIBRARY_BYTES
        waiting = {**host, "hidden states": second, "libraries": LIBRARY_BYTES}
    else:
        device["hidden states"] += second
        waiting, device = {**device, **host, "libraries": LIBRARY_BYTES}, {}
    return Footprint(_kept(device), _kept(waiting), _kept(disk), streamed)


def _kept(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}


def exchanged_bytes(spec: PruneSpec, shape: Shape, actors: int) -> tuple[float, float]:
    """Return the bytes that actors sharing one pruning receive: the busiest one, and all.

    Each matrix is pruned by one actor, large ones first by the one with the fewest weights so far.
    For each input of its matrices the actors add their statistics in pairs until two are left,
    which it receives. One actor has a part in the additions of every level. Everybody receives the
    mask of each other matrix in bits, or its weights.
    """
    if actors == 1:
        return 0.0, 0.0
    kind, each = statistics_of(spec), WEIGHT_BYTES[spec.dtype]
    result = MASK_BYTES if spec.stores_masks else each
    own: list[list[Matrix]] = [[] for _ in range(actors)]
    for matrix in sorted(shape.matrices, key=lambda matrix: -matrix.weights):
        min(own, key=lambda held: sum(other.weights for other in held)).append(matrix)
    everything = sum(matrix.weights for matrix in shape.matrices)
    weights = [sum(matrix.weights for matrix in held) for held in own]
    sums = []
    for held in own:
        widths = {matrix.input: matrix.columns for matrix in held}.values()
        sums.append(0 if kind == "none" else sum(statistic_bytes(kind, w) for w in widths))
    levels, last = math.ceil(math.log2(actors)) - 1, min(2, actors - 1)
    busiest = levels * sum(sums) + last * max(sums) + result * (everything - min(weights))
    added = sum(sums) * (actors - 2 + last)
    return shape.layers * busiest, shape.layers * (added + result * (actors - 1) * everything)
