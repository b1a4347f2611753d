"""Write a commented grid for the models and texts that a user names: `calprune init`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.grid import load_grid
from jobs.one_model import (
    PREFIXES,
    PROBE,
    longest,
    named_corpus,
    named_model,
    named_texts,
    this_machine,
    together,
)
from pipeline.errors import InputError

_GRID = """\
# Which calibration data prunes {these} best? docs/grids.md explains every field.
#   calprune plan {file}         what would run, and how long it takes
#   calprune run {file}          run it, or continue it
#   calprune best {file} --sparsity 0.5 --export FOLDER
name: {name}

models:   # a folder, or a model on the hub; a commit as revision ties the results to its weights
{models}

corpora:   # files (JSON Lines, Parquet, text), or presets such as c4
{corpora}

calibrations:   # what to prune with
{calibrations}

cells:   # every list is an axis, and all axes are multiplied
  model: {model_names}
  calibration: {calibration_names}
  pruner: [wanda, sparsegpt]   # also magnitude, dsnot, ria, alps
  sparsity: [0.5, "2:4"]
  seed: [0, 1, 2]   # draws of data: a difference that one draw shows may be chance
  nsamples: 128   # windows
  seqlen: {seqlen}   # tokens of each; at most what the model takes

evaluate:
  perplexity:   # on text that is in no calibration; kl compares with the dense model
{perplexities}
  # tasks: [piqa, hellaswag]   # any of lm-eval's

{resources}
"""

_ON_GPUS = """\
resources:   # what one stage takes
  generate: {gpus: 1}
  score: {gpus: 1}
  prune: {gpus: 1}
  evaluate: {gpus: 1}"""


def write_grid(
    path: Path, models: Sequence[str], texts: Sequence[str], probe: Sequence[str]
) -> None:
    """Write a commented grid file, which `plan` and `run` take as it is.

    Args:
        models: folders or names on the hub.
        texts: files or presets to calibrate with, and whose beginnings the models continue; none
            takes a preset.
        probe: files or presets to measure on; none takes a preset.

    Raises:
        InputError: if the file exists already, a text is neither a file nor a preset, two names are
            one, or a model is neither here nor on a hub in reach.
    """
    if path.exists():
        raise InputError("file", str(path), "exists already: name a new one, or remove it")
    named = dict(map(named_model, models))
    if len(named) < len(models):
        raise InputError("model", ", ".join(models), "two have one name: rename a folder")
    own, held_out = tuple(texts) or (PREFIXES,), tuple(probe) or (PROBE,)
    shared = sorted({*own} & {*held_out})
    if shared:
        remedy = "is also to calibrate with, so it would look too good: name held-out text"
        raise InputError("probe", shared[0], remedy)
    names = named_texts((*own, *held_out))
    sources = [names[text] for text in own]
    calibrations: dict[str, dict[str, Any]] = {name: {"corpus": name} for name in sources}
    if len(sources) > 1:
        calibrations["mixed"] = {"corpus": together(sources)}
    calibrations["self-generated"] = {"prefixes": together(sources), "num_samples": 192}
    _, gpus = this_machine()
    seqlen = min(longest(model, entry) for model, entry in zip(models, named.values(), strict=True))
    measure = {"kl": True, "seqlen": seqlen, "max_windows": 64}
    content = _GRID.format(
        seqlen=seqlen,
        resources=_ON_GPUS if gpus else "\n".join(f"# {line}" for line in _ON_GPUS.splitlines()),
        these=" and ".join(named),
        file=path,
        name=path.stem,
        models=_lines(named),
        corpora=_lines({short: named_corpus(text) for text, short in names.items()}),
        calibrations=_lines(calibrations),
        model_names=_flow(list(named)),
        calibration_names=_flow(list(calibrations)),
        perplexities="\n".join(
            f"    - {_flow({'corpus': names[text], **measure})}" for text in held_out
        ),
    )
    path.write_text(content)
    try:
        load_grid(path)
    except InputError:
        path.unlink()
        raise


def _lines(entries: Mapping[str, object]) -> str:
    """Return a mapping's entries, a line each."""
    return "\n".join(f"  {_flow(name)}: {_flow(entry)}" for name, entry in entries.items())


def _flow(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()
