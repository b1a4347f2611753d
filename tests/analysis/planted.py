"""Tables with a planted effect for each study, and the finding expected of it."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from analysis.studies import predictor
from jobs.cells import Cell
from tests.analysis import from_grid
from tests.analysis.conftest import Row

SEEDS = range(5)
NOISE = 0.002
"""Standard deviation of a log perplexity."""

Effect = Callable[[Row], float]
"""A cell's log perplexity minus 1, before noise."""


def lineage(sparsity: float = 0.0) -> str:
    """Return the lineage of a generated calibration, as far as a study reads it."""
    model = {"kind": "prune", "sparsity": sparsity} if sparsity else {"kind": "pretrain"}
    samples = {"kind": "generate", "model": model}
    source = {"kind": "filter", "scores": {"samples": samples}}
    return json.dumps({"model": {"calibration": {"source": source}}})


def cells(**axes: Any) -> Iterator[Row]:
    """Yield all combinations of the axes' values."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def generator() -> list[Row]:
    written = {"dense": 0.0, "pruned-50": 0.5, "pruned-70": 0.7}
    return [
        {**cell, "lineage": lineage(written[cell["calibration"]])}
        for cell in cells(calibration=list(written), pruner=["wanda", "sparsegpt"])
    ]


def sparsity() -> list[Row]:
    names = ["mismatched", "self-generated", "pretraining"]
    rows = cells(calibration=names, pruner=["wanda", "sparsegpt"], sparsity=[0.3, 0.5, 0.7])
    patterned = cells(calibration=names, pruner=["wanda"], sparsity=[0.5], pattern=["2:4"])
    return [*rows, *patterned]


def language() -> list[Row]:
    names = ["north", "south", "both", "self-generated-north", "self-generated-south"]
    return list(
        cells(task=["north-heldout", "south-heldout"], calibration=names, pruner=["wanda", "ria"])
    )


def amount() -> list[Row]:
    counts = cells(nsamples=[1, 16, 64, 256], seqlen=[128], pruner=["wanda", "sparsegpt"])
    return [*counts, *cells(nsamples=[64], seqlen=[32], pruner=["wanda", "sparsegpt"])]


def predicting() -> list[Row]:
    """Return twelve sources; the first is the likeliest under the model."""
    rows = []
    for place in range(12):
        scores = {name: float(np.sin(5 * place + at)) for at, name in enumerate(predictor.SCORES)}
        scores["min_k_plus_plus"] = -0.1 * place
        for cell in cells(pruner=["wanda", "sparsegpt"]):
            report = json.dumps(scores)
            rows.append({**cell, "calibration": f"source-{place}", "calibration_report": report})
    return rows


# The rows, the planted effect, the finding expected of it, and the one expected of noise alone.
CASES: dict[str, tuple[Callable[[], list[Row]], Effect, str, str]] = {
    "generator": (
        generator,
        lambda cell: (
            0.04
            * json.loads(cell["lineage"])["model"]["calibration"]["source"]["scores"]["samples"][
                "model"
            ].get("sparsity", 0.0)
        ),
        r"pruned versions of the model write prune it worse than its own\. "
        r"All pruned generators against the dense one: \+2\.[3456] %",
        "No difference between data of the dense model and of pruned versions is shown",
    ),
    "sparsity": (
        sparsity,
        lambda cell: (
            -0.03
            * (cell["calibration"] == "self-generated" and cell["sparsity"] >= 0.5)
            * (cell.get("pattern") is None)
        ),
        r"beat the mismatched corpus from 50 % on\. By target: 30 % \S+ % .*; "
        r"50 % −(2\.[789]|3\.[012]) %",
        "It is not shown at any sparsity that self-generated data beat the mismatched corpus",
    ),
    "language": (
        language,
        lambda cell: 0.05 * (cell["task"].split("-")[0] not in cell["calibration"]),
        r"Calibration in a language keeps it better than calibration in the other\. "
        r"Its own language against the other: −(4\.[789]|5\.[01]) %",
        "It is not shown that calibration in a language keeps it better than in the other",
    ),
    "amount": (
        amount,
        lambda cell: 0.5 / cell["nsamples"] ** 0.5,
        r"More than 64 windows still help\. No smaller number .* 64 windows against 256: "
        r"\+(3\.[01234]) %",
        "It is not shown that more than 64 windows help. 1 windows are enough",
    ),
    "predictor": (
        predicting,
        lambda cell: 0.01 * int(cell["calibration"].split("-")[1]),
        r"Sources of higher Min-K%\+\+ go with lower harm by pruning \(rank correlation −?-?"
        r"(0\.9|1\.0).*The source chosen by a score loses .*: Min-K%\+\+ 0\.[0-3];",
        "It is not shown that Min-K%++ ranks sources as pruning does",
    ),
}


def filter_harms(cell: Cell, task: str) -> float:
    """A filter by perplexity harms, within clusters less, and a random one does nothing."""
    harm = {"perplexity": 0.05, "perplexity-within-clusters": 0.03}.get(cell.calibration, 0.0)
    return harm * (0 if task == "prose-heldout" else 1)


def absent_kinds_are_lost(cell: Cell, task: str) -> float:
    """A kind of text that calibration data lacks is lost; dilution does nothing."""
    kind = task.removesuffix("-heldout")
    lacking = {"four": ("foreign",), "two": ("arithmetic", "code", "foreign"), "unseen": (kind,)}
    kinds = str(cell.calibration).partition("-")[0]
    return 0.2 * (kind in lacking.get(kinds, ()))


def generated_text_helps(cell: Cell, task: str) -> float:
    """96 generated samples and more help; a dearer pruner does nothing."""
    return -0.1 * ((cell.num_samples or 0) >= 96)


def others_are_lost(cell: Cell, task: str) -> float:
    """A single source loses other kinds of text; mixed data loses none."""
    return 0.1 * (cell.calibration not in ("mixed", task.removesuffix("-heldout")))


def long_prefixes_harm(cell: Cell, task: str) -> float:
    return 0.05 * ((cell.prefix_tokens or 0) >= 16)


# The same of studies that declare their design, whose rows are those of their own grid.
DECLARED: dict[str, tuple[from_grid.Effect, str, str]] = {
    "filter": (
        filter_harms,
        r"^Worse: a perplexity filter against a random one, a perplexity filter against none and a "
        r"perplexity filter within clusters against a random one\. Equal within the smallest "
        r"effect of interest: a random filter against none\. A perplexity filter against a "
        r"random one: \+(4\.[5-9]|5\.[0-5]) % \(95 % interval \+4\.\d to \+[56]\.\d; "
        r"p < 0\.001; 8 models; .* Intervals are over 8 models; "
        r"without the noise of the evaluation texts; .*"
        r"against random, prose: \S+ % [^:]*: equivalent\. .* The best filter is, with 95 % "
        r"confidence, (random or unfiltered|unfiltered or random)\. .* "
        r"The design was declared before there was a result\.$",
        "Equal within the smallest effect of interest: a perplexity filter against a random one, ",
    ),
    "similarity": (
        absent_kinds_are_lost,
        r"^Worse: two kinds against five with half unseen text and two kinds against five\. "
        r"Equal within the smallest effect of interest: half unseen text against none\. "
        r"Two kinds against five with half unseen text: \+1[56]\.\d % .* "
        r"Four kinds against five, on the absent kind: \+2[123]\.\d % [^:]*: worse\. .* "
        r"Two kinds against five, on these two: \S+ % [^:]*: equivalent\. .* "
        r"The best calibration data is, with 95 % confidence, five-kinds or "
        r"five-kinds-half-unseen\. ",
        "Equal within the smallest effect of interest: two kinds against five with half unseen",
    ),
    "cost": (
        generated_text_helps,
        r"^Better: 96 samples against the corpus and 192 samples against the corpus\. "
        r"Equal within the smallest effect of interest: 24 samples against the corpus\. .* "
        r"96 samples against the corpus: −9\.\d % .* "
        r"96 filtered samples against 96: \S+ % [^:]*: equivalent\. .* "
        r"Device-seconds of data and pruning, 24 samples against the corpus: 6\.0 against 2\.0; "
        r"96 samples against the corpus: 15\.0 against 2\.0; ",
        "Equal within the smallest effect of interest: 24 samples against the corpus, ",
    ),
    "mixing": (
        others_are_lost,
        r"^Better: mixed against facts, mixed against dialogue, mixed against arithmetic, "
        r"mixed against code and mixed against foreign\. "
        r"Mixed against facts: \+(4\.[89]|5\.[01]) points .* "
        r"On code, mixed against its own source: \S+ % [^:]*: equivalent\. .* "
        r"On code, mixed against other sources: −9\.\d % [^:]*: better\. .* "
        r"The best source for the worst kind is, with 95 % confidence, mixed\. ",
        "Equal within the smallest effect of interest: mixed against facts, ",
    ),
    "prefix-length": (
        long_prefixes_harm,
        r"^Better: 1 to 4 tokens against 16 and more\. 1 to 4 tokens against 16 and more: "
        r"−(4\.[789]|5\.[01]) % .* 10 models; .* "
        r"2 tokens against none: \S+ % [^:]*: equivalent\. .* "
        r"With the shape as unit, short against long: −(4\.[89]|5\.0) % [^:]* 5 shapes\)\. "
        r"It is not shown that shapes differ",
        "Equal within the smallest effect of interest: 1 to 4 tokens against 16 and more.",
    ),
}


def planted(settings: list[Row], effect: Effect) -> list[Row]:
    """Return one row per setting and seed, with the effect in the logarithm of its perplexity.

    An accuracy is the inverse of such a perplexity."""
    noise = np.random.default_rng(3)
    by_seed = noise.normal(0, 0.05, len(SEEDS))  # common to a seed, so that pairing removes it
    rows = []
    for place, (cell, seed) in enumerate(itertools.product(settings, SEEDS)):
        level = 1 + effect(cell) + by_seed[seed] + noise.normal(0, NOISE)
        value = float(np.exp(-level if cell.get("metric") == "acc" else level))
        own = {"calibration": "own", "task": "heldout", "metric": "perplexity", **cell}
        rows.append({**own, "value": value, "seed": seed, "cell": str(place)})
    return rows
