"""Mistakes in the text of grid files, as people make them."""

from pathlib import Path

import pytest

from jobs.grid import load_grid
from jobs.plan import make_plan
from pipeline.errors import InputError

GRID = """\
name: small
models:
  small: testbed-tiny
  llama: {kind: hub-model, name: meta-llama/Llama-2-7b-hf}
corpora:
  web: {kind: file-corpus, path: notes.txt}
  books: testbed-mismatched
calibrations:
  web: {corpus: web}
  own: {prefixes: web, num_samples: 80}
cells:
  model: small
  calibration: [web, own]
  pruner: [magnitude, wanda]
  sparsity: [0.5, "2:4"]
  seed: [0, 1]
  nsamples: 16
  seqlen: 64
exclude:
  - {calibration: own, seed: 1}
evaluate:
  perplexity: [{corpus: web, seqlen: 64}]
  tasks: [piqa]
  task_folder: {kind: testbed-tasks}
resources:
  prune: {cpus: 1}
"""

TRUTH = "takes neither true nor false.*quotes"
WIDE = "{corpus: web, seqlen: 64}"
OWN = "num_samples: 80"

MISTAKES = [
    # What YAML drops, or makes something else of
    ("  own: {prefixes", "  web: {prefixes", "line 10: 'web' stands in line 9 already"),
    ("resources:", "cells: {model: small}\nresources:", "line 25: 'cells' stands in line 11"),
    ("[0.5,", "&a [*a,", r"line 15: \*a stands inside what it stands for"),
    ('"2:4"]', "2:4]", "line 15: YAML reads 2:4 as a number in base 60: put it in quotes"),
    ("[0, 1]", "012", "line 16: YAML reads 012 in base 8: write 12"),
    ("  books:", "  no:", "line 7: YAML reads the name no as true or false: put it in quotes"),
    ("  books:", "  2024:", "line 7: YAML reads the name 2024 as a number: put it in quotes"),
    ("  books:", "  [a]:", "line 7: a name must be text"),
    ("calibration: [web, own]", "calibration: [own, no]", rf"cells.calibration: False: .*{TRUTH}"),
    (OWN, "num_samples: yes", rf"calibrations.own.num_samples: True: .*{TRUTH}"),
    ("[0.5,", "[off,", rf"cells.sparsity: False: .*{TRUTH}"),
    ("name: small", "name: 2024-01-01", "name: .*reads this as a date: put it in quotes"),
    ("name: small", "name: 7", r"^name: 7: must be text: put it in quotes \(line 1\)"),
    ("name: small", "name: [small", "is not a YAML file: line 2: "),
    ("name: small", "\tname: small", "is not a YAML file: line 1: .*cannot start any token"),
    ("name: small", "name: @small", "is not a YAML file: line 1: "),
    # What is missing, empty, or too much
    ("name: small", "name:", r"^name: None: is empty: give it a value, or remove the line"),
    ("name: small\n", "", "^name: None: is missing; add it"),
    ("{corpus: web}", "", r"calibrations.web: None: is empty"),
    ("[0, 1]", "[]", "cells.seed: .*axis without values"),
    ("{corpus: web}", "{corpus: {web: 1}}", r"web.corpus: .*must have at least 2 entries"),
    ("name: meta-llama/Llama-2-7b-hf", "name: ''", "models.llama.name: '': must not be empty"),
    ("kind: hub-model, ", "", "models.llama: .*does not say which kind it is: add kind"),
    ("wanda]", "{nme: wanda}]", "cells.pruner: .*does not say which kind it is: add name"),
    ("[piqa]", "[piqa, piqa]", "evaluate: .*'piqa' is measured twice; leave one"),
    # Names and words that nearly fit
    ("models:", "modles:", r"^modles: .*no such field; did you mean 'models'\? \(line 2\)"),
    ("testbed-tiny", "testbed-tny", "models.small: .*did you mean 'testbed-tiny'"),
    ("hub-model", "hubmodel", "models.llama.kind: 'hubmodel': .*did you mean 'hub-model'"),
    ("hf}", "hf, dtype: bf16}", "models.llama.dtype: 'bf16': .*did you mean 'bfloat16'"),
    ("hf}", "hf, revison: x}", "models.llama.revison: 'x': .*did you mean 'revision'"),
    ("testbed-mismatched", "wikpedia", r"corpora.books: .*did you mean 'wikipedia'\? \(line 7\)"),
    ("path: notes", "pth: notes", "corpora.web.pth: .*did you mean 'path'"),
    ("path: notes.txt", "path: nots.txt", "'nots.txt': no file is there"),
    ("{corpus: web}", "{corpus: wbe}", "web.corpus: 'wbe': .*did you mean 'web'.*line 9"),
    ("{corpus: web}", "{corpsu: web}", "calibrations.web: .*give corpus for real text"),
    ("{corpus: web}", "{corpus: web, packing: concta}", "packing: 'concta': .*mean 'concat'"),
    (OWN, "topk: 50", r"calibrations.own.topk: 50: .*did you mean 'top_k'\? \(line 10\)"),
    (OWN, "scorer: lama", "calibrations.own.scorer: 'lama': .*did you mean 'llama'"),
    (OWN, "generator: {pruner: wnada, sparsity: 0.5}", "own.generator.pruner: .*mean 'wanda'"),
    (OWN, "backend: vlm", "calibrations.own.backend: 'vlm': .*known are transformers and vllm"),
    (OWN, "backend: {name: vllm, tensor_paralel_size: 2}", "mean 'tensor_parallel_size'"),
    (OWN, "banned_words: none.txt", "'none.txt': no file is there"),
    ("model: small", "model: smal", "cells.model: 'smal': .*did you mean 'small'.*line 12"),
    ("wanda]", "wnada]", r"cells.pruner: 'wnada': .*did you mean 'wanda'\? \(line 14\)"),
    ("wanda]", "{name: wanda, variants: true}]", "cells.pruner.variants: .*mean 'variant'"),
    ("  sparsity:", "  sparisty:", "cells.sparisty: .*did you mean 'sparsity'"),
    ("64\nexclude", "64\n  allocation: owel\nexclude", "cells.allocation: 'owel': .*'owl'"),
    ("{calibration: own,", "{calibraton: own,", "exclude.0.calibraton: .*mean 'calibration'"),
    ("own, seed: 1}", "own, seed: 7}", "exclude.0: .*matches no cell.*line 20"),
    ("tasks: [piqa]", "task: [piqa]", "evaluate.task: .*did you mean 'tasks'"),
    ("[piqa]", "[{name: piqa, num_fewshots: 5}]", "tasks.0.num_fewshots: 5: .*'num_fewshot'"),
    (f"[{WIDE}]", "[{corpus: wbe}]", "evaluate.perplexity.0.corpus: 'wbe': .*mean 'web'"),
    (f"[{WIDE}]", "[{corpus: web, protocol: wanda-wikitext}]", "0.protocol: .*'wanda-wikitext2'"),
    ("[piqa]", "[piqa]\n  suites: [papr]", "evaluate.suites.0: .*did you mean 'paper'"),
    ("prune: {cpus", "prun: {cpus", "resources.prun: 'prun': .*did you mean 'prune'"),
    ("{cpus: 1}", "{cpu: 1}", "resources.prune.cpu: 1: .*did you mean 'cpus'"),
    ("resources:", "include: [{sparsty: 0.6}]\nresources:", "include.0.sparsty: .*'sparsity'"),
    ("resources:", "cost: {parameters: {lama: 7.0e+9}}\nresources:", "cost.parameters: 'lama'"),
    # Values of another type
    (
        f"[{WIDE}]",
        "[{corpus: web, protocol: {a: 1}}]",
        "perplexity.0.protocol: {'a': 1}: .*no such",
    ),
    ("testbed-mismatched", "{preset: [a]}", "corpora.books: .*there is no preset"),
    ("[piqa]", "hellaswag", r"evaluate.tasks: 'hellaswag': must be a list of tasks: .*\[hella"),
    (f"[{WIDE}]", "{corpus: web}", "evaluate.perplexity: .*a list: put a dash before each"),
    (
        "{kind: testbed-tasks}",
        "tasks",
        "evaluate.task_folder: 'tasks': must be a mapping of fields",
    ),
    (OWN, "temperature: hot", "calibrations.own.temperature: 'hot': must be a number"),
    (OWN, "num_samples: 2.5", "calibrations.own.num_samples: 2.5: must be a whole number"),
    ("nsamples: 16", "nsamples: many", "cells.nsamples: 'many': must be a whole number"),
    ("{cpus: 1}", "{memory_bytes: 16GB}", "prune.memory_bytes: '16GB': must be a whole number"),
    ("resources:", "checkpoints: sometimes\nresources:", "checkpoints: .*must be true or false"),
    # Values out of range
    ("[0.5,", "[50,", r"cells.sparsity: 50: must be less than 1; write 0.5 for 50 % \(line 15\)"),
    ("[0.5,", '["50%",', "cells.sparsity: '50%': write a share, as 0.5 for 50 %"),
    ("[0.5,", "[-0.5,", "cells.sparsity: -0.5: must be at least 0"),
    ('"2:4"]', '"4:2"]', "cells.sparsity: '4:2': .*N must not exceed M"),
    (OWN, "top_p: 95", "calibrations.own.top_p: 95: must be at most 1; write 0.95 for 95 %"),
    (OWN, "drop_fraction: 20", "own.drop_fraction: 20: must be less than 1; write 0.2 for 20 %"),
    (OWN, "num_samples: -5", "calibrations.own.num_samples: -5: must be at least 1"),
    ("seqlen: 64\n", "seqlen: 4\n", "cells.seqlen: 4: must be at least 8"),
    ("{cpus: 1}", "{gpus: 1.5}", "resources.prune.gpus: 1.5: .*round it"),
    ("{cpus: 1}", "{replicas: {min: 4, max: 2}}", "max 2 is less than min 4: raise max"),
    ("name: small", "name: a/b", "name: 'a/b': must begin with a letter or digit"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_with_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("a line of text\n" * 90)


def test_a_grid_without_a_mistake_is_planned() -> None:
    Path("grid.yaml").write_text(GRID)
    assert make_plan(load_grid(Path("grid.yaml"))).cells


@pytest.mark.parametrize(
    ("right", "wrong", "message"), MISTAKES, ids=[wrong for _, wrong, _ in MISTAKES]
)
def test_a_mistake_is_named_with_field_value_and_remedy_in_one_short_line(
    right: str, wrong: str, message: str
) -> None:
    assert GRID.count(right)
    Path("grid.yaml").write_text(GRID.replace(right, wrong, 1))
    with pytest.raises(InputError, match=message) as caught:
        make_plan(load_grid(Path("grid.yaml")))
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_a_name_with_a_dot_and_merged_fields_are_no_mistakes() -> None:
    text = GRID.replace("  web: {corpus: web}", "  web: {corpus: web}\n  a.b: &x {corpus: web}")
    text = text.replace("  own:", "  c: {<<: *x, packing: concat}\n  own:")
    Path("grid.yaml").write_text(text)
    assert load_grid(Path("grid.yaml")).calibrations["c"].packing == "concat"
    Path("grid.yaml").write_text(text.replace("&x {corpus: web}", "&x {corpus: wbe}"))
    with pytest.raises(InputError, match=r"calibrations\.a\.b\.corpus: .*line 10"):
        make_plan(load_grid(Path("grid.yaml")))
