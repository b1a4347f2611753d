"""A grid from what a user says about one model: `calprune prune` and `calprune calibrate`."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from jobs.grid import Grid, grid_of
from jobs.outside import with_fingerprints
from jobs.plan import Plan, make_plan, plan_for
from pipeline.data.corpora import check_corpus
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.errors import InputError, did_you_mean
from pipeline.hub import hub_answers
from pipeline.specs import FilterSpec, GenerateSpec, HubModel, LocalModel, PruneSpec

SELF = "self"
"""The calibration that the model writes itself."""

PREFIXES, PROBE = "wikipedia", "wikitext2"
"""Texts on the hub that are taken where none is named."""

LONGEST = 2048
"""Tokens of a window, where the model takes as many and none are asked for."""

_SAMPLES_PER_WINDOW = 1.5
"""Generated texts. More than one, as those that end early are shorter than a window."""

_PROTOCOLS = {"wikitext2": "wanda-wikitext2", "c4-validation": "wanda-c4"}
"""Texts whose perplexity has a protocol of the field's own."""

_PROBE_WINDOWS = 64
"""At most this many windows of each other text."""

_ON_DEVICES = ("generate", "score", "outliers", "prune", "evaluate")
"""Stages that run the model."""


class OneModel(NamedTuple):
    """What to make of a model."""

    model: str
    """A folder, or a name on the hub, with `@REVISION` if it is not `main`."""

    calibration: tuple[str, ...] = (SELF,)
    """`self`, or presets and files, all with the same weight."""

    prefixes: tuple[str, ...] = ()
    """Presets and files whose beginnings the model continues; none takes `PREFIXES`."""

    probe: tuple[str, ...] = ()
    """Presets and files to compare the pruned model with the dense one on; none takes `PROBE`."""

    sparsity: str = "0.5"
    """A share, or N:M."""

    pruner: str = "wanda"
    allocation: str = "uniform"
    reconstruct: bool = False
    nsamples: int = 128
    seqlen: int | None = None
    """None takes `LONGEST`, or what the model takes if that is less."""

    seed: int = 0
    cpus: int | None = None
    gpus: float | None = None
    """For each stage that runs the model; None takes what `with_devices` says."""


def this_machine() -> tuple[int, float]:
    """Return the CPUs and GPUs of this machine for one stage: all CPUs if there is no GPU."""
    from torch import cuda  # imported late, as it takes seconds

    if cuda.is_available():
        return 1, 1.0
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)), 0.0
    return os.cpu_count() or 1, 0.0


def with_devices(asked: OneModel, address: str | None) -> OneModel:
    """Return it with the devices of a stage: those of this machine, or one GPU of a cluster.

    Args:
        address: of a cluster; None is a local one.
    """
    cpus, gpus = this_machine() if address is None else (1, 1.0)
    gpus = gpus if asked.gpus is None else asked.gpus
    cpus = (1 if gpus else cpus) if asked.cpus is None else asked.cpus
    return asked._replace(cpus=cpus, gpus=gpus)


def pruning_plan(asked: OneModel) -> tuple[Plan, str]:
    """Return the plan that prunes the model and compares it with the dense one, and the key of the
    pruned model.

    Raises:
        InputError: naming field, value and remedy.
    """
    read = {_place(text) for text in asked.calibration}
    for text in asked.probe:
        if _place(text) in read:
            remedy = "is what it is pruned with, so it would look too good: name held-out text"
            raise InputError("probe", text, remedy)
    plan = make_plan(_grid(asked, asked.probe or (PROBE,)))
    _check_prefixes(asked, plan)
    if not asked.probe:
        _refuse_out_of_reach("probe", PROBE)
    (key,) = (key for key, spec in plan.specs.items() if isinstance(spec, PruneSpec))
    return plan, key


def calibration_plan(asked: OneModel) -> tuple[Plan, str]:
    """Return the plan that makes the texts which a model writes for its calibration, and their key.

    Raises:
        InputError: naming field, value and remedy.
    """
    # A grid measures something; the prefixes stand for a probe that nothing reads.
    plan = make_plan(_grid(asked, asked.prefixes or (PREFIXES,)))
    _check_prefixes(asked, plan)
    (key,) = (key for key, spec in plan.specs.items() if isinstance(spec, FilterSpec))
    return plan_for(plan, [key]), key


def _place(text: str) -> str:
    """Return a file's whole path; a preset, a URL or `self` as it is."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def _grid(asked: OneModel, probe: Iterable[str]) -> Grid:
    return with_fingerprints(grid_of(grid_content(asked, tuple(probe))))


def grid_content(asked: OneModel, probe: tuple[str, ...]) -> dict[str, Any]:
    """Return the grid of one model, as a file has it.

    Raises:
        InputError: if a text is neither a file nor a preset, options contradict each other, or the
            model is not to be had.
    """
    name, model = named_model(asked.model)
    read = (asked.prefixes or (PREFIXES,)) if asked.calibration == (SELF,) else asked.calibration
    names = named_texts((*read, *probe))
    label, calibration = _calibration(asked, [names[text] for text in read])
    seqlen = longest(asked.model, model) if asked.seqlen is None else asked.seqlen
    needs = {"cpus": asked.cpus or 1, "gpus": asked.gpus or 0.0}
    suffix = "-reconstructed" if asked.reconstruct else ""
    return {
        "name": f"prune-{name}-{asked.pruner}-{asked.sparsity.replace(':', '-')}{suffix}",
        "models": {name: model},
        "corpora": {short: named_corpus(text) for text, short in names.items()},
        "calibrations": {label: calibration},
        "cells": {
            "model": name,
            "calibration": label,
            "pruner": asked.pruner,
            "allocation": asked.allocation,
            "reconstruction": {} if asked.reconstruct else None,
            "sparsity": as_target(asked.sparsity),
            "seed": asked.seed,
            "nsamples": asked.nsamples,
            "seqlen": seqlen,
        },
        "evaluate": {"perplexity": [_perplexity(names[text], seqlen) for text in probe]},
        "resources": dict.fromkeys(_ON_DEVICES, needs),
    }


def _calibration(asked: OneModel, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return name and entry of the calibration.

    Args:
        names: of the texts that it reads.
    """
    if asked.calibration != (SELF,):
        if SELF in asked.calibration:
            remedy = "goes with no other text: name that as prefixes, or leave self out"
            raise InputError("calibration", SELF, remedy)
        if asked.prefixes:
            remedy = f"are for calibration {SELF}: leave them out, or the calibration"
            raise InputError("prefixes", ", ".join(asked.prefixes), remedy)
        return "+".join(names), {"corpus": together(names), "packing": "concat"}
    generated = {
        "prefixes": together(names),
        "num_samples": int(_SAMPLES_PER_WINDOW * asked.nsamples),
        # On a CPU vLLM is the slower one. transformers holds keys and values of a whole shard.
        **({"backend": "vllm"} if asked.gpus and find_spec("vllm") else {"shard_size": 16}),
    }
    return "self-generated", generated


def named_model(model: str) -> tuple[str, dict[str, Any]]:
    """Return a short name and the grid's entry of a model that is a folder or on the hub."""
    local = "://" in model or model.startswith((".", "/")) or Path(model).exists()
    if local:
        name = (
            model.rstrip("/").rpartition("/")[2] if "://" in model else Path(model).resolve().name
        )
        entry = {"kind": "local-model", "path": model}
    else:
        path, _, revision = model.partition("@")
        name = path.rpartition("/")[2]
        entry = {"kind": "hub-model", "name": path, **({"revision": revision} if revision else {})}
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")
    return short or "model", {**entry, "dtype": "auto"}


def named_corpus(text: str) -> str | dict[str, str]:
    """Return the grid's entry of a text that is a preset or a file.

    Raises:
        InputError: if it is neither.
    """
    if text in CORPUS_PRESETS:
        return text
    if "://" in text or any(mark in text for mark in "*?[") or Path(text).exists():
        return {"kind": "file-corpus", "path": text}
    remedy = f"is no file here and no preset; {did_you_mean(text, CORPUS_PRESETS)}"
    raise InputError("text", text, remedy)


def named_texts(texts: Iterable[str]) -> dict[str, str]:
    """Return the name of each text in a grid: a preset's own, or the file's without folder and
    ending, unless another one has it too."""
    shorts = {text: text if text in CORPUS_PRESETS else Path(text).stem for text in texts}
    counts = Counter(shorts.values())
    return {text: short if counts[short] == 1 else text for text, short in shorts.items()}


def together(names: Sequence[str]) -> str | dict[str, int]:
    """Return corpora as a grid mixes them, all with the same weight."""
    return names[0] if len(names) == 1 else dict.fromkeys(names, 1)


def as_target(sparsity: str) -> str | float:
    """Return a sparsity as a grid has it: a number, or N:M."""
    try:
        return float(sparsity)
    except ValueError:
        return sparsity


def _perplexity(text: str, seqlen: int) -> dict[str, Any]:
    own = {"corpus": text, "seqlen": seqlen, "kl": True}
    if text in _PROTOCOLS:
        return {"protocol": _PROTOCOLS[text], **own}
    return {"max_windows": _PROBE_WINDOWS, **own}


def longest(model: str, entry: Mapping[str, Any]) -> int:
    """Return the tokens of a window, by the model's configuration."""
    from pipeline.models.inspection import inspect_model

    kind = HubModel if entry["kind"] == "hub-model" else LocalModel
    found = inspect_model(kind.model_validate({**entry, "dtype": "float32"}))
    if found is None:
        raise InputError("model", model, "is no folder here, and the hub is out of reach")
    limit = getattr(found.config.get_text_config(), "max_position_embeddings", None)
    return min(LONGEST, limit or LONGEST)


def _check_prefixes(asked: OneModel, plan: Plan) -> None:
    generates = any(isinstance(spec, GenerateSpec) for spec in plan.specs.values())
    if generates and not asked.prefixes:
        _refuse_out_of_reach("prefixes", PREFIXES)


def _refuse_out_of_reach(option: str, preset: str) -> None:
    """Check that a text which nobody named can be read."""
    if not hub_answers() and check_corpus(CORPUS_PRESETS[preset]) is not None:
        remedy = f"is the default, and its hub is out of reach: give --{option} FILE"
        raise InputError(option, preset, remedy)
