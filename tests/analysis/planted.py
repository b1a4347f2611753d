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


def cells(**axes: Any) -> Iterator[Row]:
    """Yield all combinations of the axes' values."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


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
    "predictor": (
        predicting,
        lambda cell: 0.01 * int(cell["calibration"].split("-")[1]),
        r"Sources of higher Min-K%\+\+ go with lower harm by pruning \(rank correlation −?-?"
        r"(0\.9|1\.0).*The source chosen by a score loses .*: Min-K%\+\+ 0\.[0-3];",
        "It is not shown that Min-K%++ ranks sources as pruning does",
    ),
}


def filter_harms(cell: Cell, task: str) -> float:
    """A filter by perplexity harms by its share, within clusters less; a random one does not."""
    arms = {"perplexity-10": 0.025, "perplexity": 0.05, "perplexity-40": 0.1}
    harm = {**arms, "perplexity-within-clusters": 0.03}.get(cell.calibration, 0.0)
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


def python_harms_all_but_awq(cell: Cell, task: str) -> float:
    """Other text than Python's is lost by calibration with Python."""
    assert cell.pruner is not None
    harmed = cell.calibration == "python" and task != "python-heldout"
    return 0.3 * (harmed and cell.pruner.name != "awq")


def all_but_awq_need_data(cell: Cell, task: str) -> float:
    """The mismatched corpus harms, refitted weights most; AWQ takes any text."""
    assert cell.pruner is not None
    if cell.pruner.name == "awq":
        return 0.0
    harm = {"refit": 0.15, "gptq": 0.02 if cell.target_name == "3 bit" else 0.3}
    return harm.get(cell.pruner.name, 0.08) * (cell.calibration == "mismatched")


def the_fits_data_decide(cell: Cell, task: str) -> float:
    """Fitted weights make up for the mask; the mismatched corpus harms what is fitted to it."""
    assert cell.pruner is not None
    fitted = cell.reconstruction
    if fitted is None:
        level = {"wanda": 0.2, "sparsegpt": 0.15, "alps": 0.1}[cell.pruner.name]
        return level + 0.06 * (cell.calibration == "mismatched")
    return 0.05 + 0.15 * ((fitted.calibration or cell.calibration) == "mismatched")


def long_prefixes_harm(cell: Cell, task: str) -> float:
    return 0.05 * ((cell.prefix_tokens or 0) >= 16)


def harms_by_generator(cell: Cell, task: str) -> float:
    """The sparser the generator, the worse its text."""
    sparsity = cell.calibration.rpartition("-")[2]
    return int(sparsity) / 1000 if sparsity.isdigit() else 0.0


def helps_from_50_on(cell: Cell, task: str) -> float:
    """Self-generated text helps from 50 % on, filtered text less, and SparseGPT twice as much as
    Wanda; at 80 % no model is of use."""
    helps = {"self-generated": -0.1, "self-generated-filtered": -0.06}.get(cell.calibration, 0.0)
    helps *= (cell.sparsity > 0.4) * (2 if cell.pruner and cell.pruner.name == "sparsegpt" else 1)
    return helps + 4.3 * (cell.sparsity == 0.8)


def keeps_its_language(cell: Cell, task: str) -> float:
    """Text of the other language harms, Latin text most, and questions more than text; text of both
    harms Latin text."""
    if cell.calibration == "both":
        return 0.05 * (task == "latin-heldout")
    harm = 0.4 if task.startswith("testbed_") else 0.2 if task == "latin-heldout" else 0.1
    return harm * (("foreign" in task) != ("foreign" in cell.calibration))


def needs_windows(cell: Cell, task: str) -> float:
    """A harm that falls with the number of tokens."""
    return 0.3 * 128 / ((cell.nsamples or 1) * (cell.seqlen or 1))


def keeps_its_kind(cell: Cell, task: str) -> float:
    """A kind of text, or its language's questions, that the calibration data do not have is lost;
    the model's own text has Wikipedia alone."""
    kind = task.removesuffix("-heldout").rpartition("handbook-")[2]
    held = {"mixed": True, "all": True, "self-generated": kind == "wikipedia"}
    held |= {"mixed-without-python": kind != "python", "mixed-without-french": kind != "french"}
    return 0.2 * (not held.get(cell.calibration, cell.calibration == kind))


def mismatch_harms_more_with_sparsity(cell: Cell, task: str) -> float:
    harm = {0.3: 0.0, 0.6: 0.1, 0.7: 0.5}[cell.sparsity or 0.3]
    return harm * (cell.calibration == "japanese")


# The same of studies that declare their design, whose rows are those of their own grid.
DECLARED: dict[str, tuple[from_grid.Effect, str, str]] = {
    "generator": (
        harms_by_generator,
        r"^Worse: all pruned generators against the dense one\. All pruned generators against the "
        r"dense one: \+5\.[0-9] % \(95 % interval \+[45]\.\d to \+[56]\.\d; .*: worse\. .*"
        r"Magnitude-30 against dense: \+(2\.[5-9]|3\.[0-5]) % .*"
        r"Wanda-60 against dense: \+(5\.[5-9]|6\.[0-9]) % .*"
        r"The sparsest generator against the least sparse: \+(3\.[5-9]|4\.[0-6]) % [^:]*: worse\. "
        r".*The best generator is, with 95 % confidence, dense\.",
        "Equal within the smallest effect of interest: all pruned generators against the dense ",
    ),
    "sparsity": (
        helps_from_50_on,
        r"^Better: self-generated text at 50 %, self-generated text at 60 %, self-generated text "
        r"at 4:8 and self-generated text at 2:4\. Equal within the smallest effect of interest: "
        r"self-generated text at 70 %\. Not shown: self-generated text at 30 %\. Of no use on "
        r"either side: self-generated text at 80 %\. .*at 60 %: −(9\.\d|10\.\d) % .* "
        r"Self-generated with SparseGPT, 60 %: −(17|18)\.\d % .* "
        r"Filtered against unfiltered, 60 %: \+(3\.[5-9]|4\.[0-6]) % [^:]*: worse\.",
        "Equal within the smallest effect of interest: self-generated text at 50 %, "
        "self-generated text at 60 %, self-generated text at 70 %, self-generated text at 80 %, ",
    ),
    "compressors": (
        all_but_awq_need_data,
        r"^Better: self-generated text with Wanda, 60 %, self-generated text with refitted Wanda, "
        r"60 %, self-generated text with SparseGPT, 60 %, self-generated text with GPTQ, 3 bits "
        r"and self-generated text with GPTQ, 2 bits\. Not shown: self-generated text with AWQ, "
        r"3 bits\. .*with refitted Wanda, 60 %: −1[34]\.\d % .*"
        r"Refitted Wanda against SparseGPT, mismatched text: \+7\.\d % [^:]*: worse\.",
        "Equal within the smallest effect of interest: self-generated text with Wanda, 60 %, ",
    ),
    "reconstruction": (
        the_fits_data_decide,
        r"^Worse: reconstructed Wanda against ALPS, mismatched text\. Better: reconstructed Wanda "
        r"against SparseGPT, self-generated text and reconstructed Wanda against ALPS, "
        r"self-generated text\. .*for the fit alone, [^:]*: −1[34]\.\d % "
        r"[^:]*: better\. Another set for the mask alone, [^:]*: [−+]0\.\d % [^:]*: equivalent\. "
        r"Another set for both, [^:]*: −1[34]\.\d % .*without a fit, [^:]*: −(5|6)\.\d % ",
        "Equal within the smallest effect of interest: reconstructed Wanda against SparseGPT, ",
    ),
    "language": (
        keeps_its_language,
        r"^Better: Latin text by calibration in Latin against foreign and foreign text by "
        r"calibration in foreign against Latin\. Latin text by calibration in Latin against "
        r"foreign: −(17|18)\.\d % .* Foreign text by calibration in foreign against Latin: "
        r"−(9\.\d|10\.\d) % .* Latin text by both against Latin: \+(4\.[5-9]|5\.[0-6]) % "
        r"[^:]*: worse\. .* Sums by Latin against foreign: \+(1[89]|2[01])\.\d points [^:]*: "
        r"better\. .* The best calibration for Latin text is, with 95 % confidence, "
        r"(latin or self-generated-latin|self-generated-latin or latin)\.",
        "Equal within the smallest effect of interest: Latin text by calibration in Latin against "
        "foreign and foreign text by calibration in foreign against Latin.",
    ),
    "amount": (
        needs_windows,
        r"^Worse: 16 windows against 512\. Equal within the smallest effect of interest: 64 "
        r"windows against 512 and 256 windows against 512\. "
        r"16 windows against 512: \+(1\.[5-9]|2\.[0-3]) % .* "
        r"As many windows of 16 tokens as of 128: \+(2\.[89]|3\.[0-9]) % [^:]*: worse\. "
        r"As much text in windows of 16 tokens as of 128: \S+ % [^:]*: equivalent\.",
        "Equal within the smallest effect of interest: 16 windows against 512, 64 windows against "
        "512 and 256 windows against 512.",
    ),
    "filter": (
        filter_harms,
        r"^Worse: a perplexity filter against a random one, a perplexity filter against none and a "
        r"perplexity filter within clusters against a random one\. Equal within the smallest "
        r"effect of interest: a random filter against none\. A perplexity filter against a "
        r"random one: \+(4\.[5-9]|5\.[0-5]) % \(95 % interval \+4\.\d to \+[56]\.\d; "
        r"p < 0\.001; 8 models; .*"
        r"Perplexity against random, 40 % dropped: \+(9\.[5-9]|1[01]\.\d) % [^:]*: worse\. .*"
        r"against random, prose: \S+ % [^:]*: equivalent\. .* Intervals are over 8 models; "
        r"without the noise of the evaluation texts; .* The best filter is, with 95 % "
        r"confidence, (?!perplexity)(?!.* or perplexity)[^.]*\. .* "
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
    "real-coverage": (
        keeps_its_kind,
        r"^Better: english by english against other kinds, .* and japanese by japanese against "
        r"other kinds\. English by english against other kinds: −0\.(2[789]|30)\d .* 3 draws of "
        r"this one model.* Python by mixed without Python against mixed: \+0\.(2[789]|30)\d .*: "
        r"worse\. .* "
        r"Other kinds by mixed without Python against mixed: \S+ [^:]*: equivalent\. .* "
        r"KL, self-generated against mixed: \+0\.1[67]\d .*: worse\. .* "
        r"The best calibration by KL is, with 95 % confidence, mixed\. ",
        "Not shown: english by english against other kinds, ",
    ),
    "real-filter": (
        filter_harms,
        r"^Worse: a perplexity filter against a random one\. .*A perplexity filter against a "
        r"random one: \+0\.0[67]\d .*6 draws of this one model.* The best filter by KL is, with "
        r"95 % confidence, (?!perplexity or)[a-z -]*\. ",
        "Equal within the smallest effect of interest: a perplexity filter against a random one",
    ),
    "real-prefix-length": (
        long_prefixes_harm,
        r"^Better: 1 to 4 tokens against 16 and more\. .*: −0\.07\d .*2 tokens against none: \S+ "
        r"[^:]*: equivalent\. ",
        "Equal within the smallest effect of interest: 1 to 4 tokens against 16 and more.",
    ),
    "real-sparsity": (
        mismatch_harms_more_with_sparsity,
        r"^Worse: Japanese against mixed, 60 % and Japanese against mixed, 70 %\. .*"
        r"Japanese against mixed, 60 %: \+1[01]\.\d % ",
        "Equal within the smallest effect of interest: Japanese against mixed, 30 %, Japanese ",
    ),
    "real-compressors": (
        python_harms_all_but_awq,
        r"^Worse: Python against mixed, Wanda, Python against mixed, refitted Wanda, Python "
        r"against mixed, Wanda with fitted weights, Python against mixed, SparseGPT, Python "
        r"against mixed, GPTQ and Python against mixed, GPTQ with 3 bits\. "
        r"Not shown: Python against mixed, AWQ\. .*",
        "Equal within the smallest effect of interest: Python against mixed, Wanda, Python ",
    ),
    "real-language": (
        keeps_its_kind,
        r"^Better: English text by its own language, .* and Spanish text by its own language\. .* "
        r"German questions by their own language: \+\d+\.\d points [^:]*: better\. .* "
        r"All languages against English, text: −0\.2\d\d ",
        "Equal within the smallest effect of interest: French text by its own language and ",
    ),
}


def planted(settings: list[Row], effect: Effect) -> list[Row]:
    """Return one row per setting and seed, with the effect in the logarithm of its perplexity."""
    noise = np.random.default_rng(3)
    by_seed = noise.normal(0, 0.05, len(SEEDS))  # common to a seed, so that pairing removes it
    rows = []
    for place, (cell, seed) in enumerate(itertools.product(settings, SEEDS)):
        level = 1 + effect(cell) + by_seed[seed] + noise.normal(0, NOISE)
        value = float(np.exp(level))
        own = {"calibration": "own", "task": "heldout", "metric": "perplexity", **cell}
        rows.append({**own, "value": value, "seed": seed, "cell": str(place)})
    return rows
