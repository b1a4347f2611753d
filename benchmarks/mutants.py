"""How many small faults in core functions their own tests find.

    python -m benchmarks.mutants --count 200 --seed 0 [--output FILE.jsonl] [MODULE...]

A mutant is a module with one change: a comparison, a sign, a boolean, a constant, the order of two
arguments, or `min` for `max`. It is written into a copy of the checkout, and the module's tests run
there until one fails. Texts, annotations, decorators, log calls, what an error says, and constants
of patience or size (`*_SECONDS`, `*_BYTES`, `*_TOKENS`, `*_ROWS`) are left alone: they change no
result. Exit code 1: the tests fail without any change.

`--output` adds a line a mutant to a file. A mutant that the file has as caught is not run again; a
survivor is. Modules limit the run to their part of the draw.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

MODULES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("pipeline/pruning/**/*.py", "pipeline/scoring/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
)
MODULES += [f"pipeline/models/{name}.py" for name in ("hidden_states", "layer_calls")]
MODULES += [f"cluster/{name}.py" for name in ("graph", "leases", "limits", "schedule", "store")]

PRUNERS = "tests/pipeline/pruning/pruners"
FURTHER: dict[str, list[str]] = {
    "cluster/graph.py": ["tests/cluster/test_schedule.py"],
    "pipeline/models/hidden_states.py": ["tests/pipeline/pruning/test_walk.py"],
    "pipeline/models/layer_calls.py": ["tests/pipeline/pruning/test_walk.py"],
    "pipeline/pruning/allocation.py": ["tests/pipeline/pruning/test_prune.py"],
    "pipeline/pruning/changes.py": ["tests/pipeline/pruning/test_crew.py"],
    "pipeline/pruning/groups.py": ["tests/pipeline/pruning/test_crew.py"],
    "pipeline/pruning/helper.py": ["tests/pipeline/pruning/test_crew.py"],
    "pipeline/pruning/input_statistics.py": ["tests/pipeline/pruning/test_walk.py"],
    "pipeline/pruning/observed_inputs.py": ["tests/pipeline/pruning/test_walk.py"],
    "pipeline/pruning/outliers.py": [
        "tests/pipeline/pruning/test_allocation.py",
        "tests/pipeline/pruning/test_prune.py",
    ],
    "pipeline/pruning/prune.py": [
        "tests/pipeline/pruning/test_finished_layers.py",
        "tests/pipeline/pruning/test_allocation.py",
    ],
    "pipeline/pruning/sparsity_check.py": ["tests/pipeline/pruning/test_prune.py"],
    "pipeline/pruning/walk.py": [
        "tests/pipeline/pruning/test_finished_layers.py",
        "tests/pipeline/pruning/test_prune.py",
    ],
    "pipeline/pruning/window_groups.py": [
        "tests/pipeline/pruning/test_crew.py",
        "tests/pipeline/pruning/test_walk.py",
    ],
    "pipeline/pruning/pruners/awq.py": [f"{PRUNERS}/test_quantizers.py"],
    "pipeline/pruning/pruners/gptq.py": [f"{PRUNERS}/test_quantizers.py"],
    "pipeline/pruning/pruners/grids.py": [f"{PRUNERS}/test_quantizers.py"],
    "pipeline/pruning/pruners/magnitude.py": [f"{PRUNERS}/test_pruners.py"],
    "pipeline/pruning/pruners/masks.py": [f"{PRUNERS}/test_pruners.py"],
    "pipeline/pruning/pruners/permutation.py": [f"{PRUNERS}/test_ria.py"],
    "pipeline/pruning/pruners/base.py": [
        f"{PRUNERS}/test_pruners.py",
        "tests/pipeline/pruning/test_prune.py",
    ],
    "pipeline/pruning/pruners/ria.py": [f"{PRUNERS}/test_in_models.py"],
    "pipeline/pruning/pruners/rtn.py": [f"{PRUNERS}/test_quantizers.py"],
    "pipeline/pruning/pruners/sparsegpt.py": [f"{PRUNERS}/test_pruners.py"],
    "pipeline/pruning/pruners/wanda.py": [
        f"{PRUNERS}/test_pruners.py",
        f"{PRUNERS}/test_wanda_variant.py",
    ],
    "pipeline/scoring/mean_states.py": [
        "tests/pipeline/scoring/test_coverage.py",
        "tests/pipeline/scoring/test_selectors.py",
    ],
}
"""Tests of a module beside those at its mirrored path."""

WARM = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "sklearn.metrics",
    "pyarrow.parquet",
    "pandas",
    "datasets",
    "ray",
    "hypothesis",
)
"""Libraries that are imported once, before a process is forked for each mutant."""

SPEED = ("_SECONDS", "_BYTES", "_TOKENS", "_ROWS")
SWAPPED: dict[type[ast.AST], Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax",
           "argmax": "argmin", "amin": "amax", "amax": "amin"}  # fmt: skip
ORDER_IS_NO_FAULT = {"isinstance", "issubclass", "min", "max", "maximum", "minimum", "zip", "cast"}
MESSAGES = {"logger", "warnings", "logging"}


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    line: int
    before: str
    after: str
    source: str
    """Of the whole module, changed."""

    def line_of(self, caught: bool) -> str:
        """Return the mutant's line in a file of results."""
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:16]
        return json.dumps({**asdict(self), "source": digest, "caught": caught}) + "\n"


def mutants(module: str, source: str) -> list[Mutant]:
    """Return all mutants of a module, in the order of the text."""
    found = []
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    starts = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]
    text = source.encode()
    for node, changed in changes(ast.parse(source)):
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        before, after = text[first:last].decode(), f"({ast.unparse(changed)})"
        if isinstance(node, ast.AugAssign):
            after = ast.unparse(changed)
        mutated = (text[:first] + after.encode() + text[last:]).decode()
        shown = " ".join(before.split()), " ".join(after.split())
        found.append(Mutant(module, node.lineno, *shown, mutated))
    return found


def changes(tree: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
    """Yield each node that can be changed and what it is changed to."""
    for node in _that_matter(tree):
        match node:
            case ast.Compare(left, ops, comparators):
                for place, operator in enumerate(ops):
                    if type(operator) in SWAPPED:
                        others = [*ops[:place], SWAPPED[type(operator)](), *ops[place + 1 :]]
                        yield node, ast.Compare(left, others, comparators)
            case ast.BinOp(left, operator, right) if not any(map(_is_text, (left, right))):
                if type(operator) in SWAPPED:
                    yield node, ast.BinOp(left, SWAPPED[type(operator)](), right)
                if isinstance(operator, ast.Sub | ast.Div):
                    yield node, ast.BinOp(right, operator, left)
            case ast.AugAssign(target, operator, value) if type(operator) in SWAPPED:
                yield node, ast.AugAssign(target, SWAPPED[type(operator)](), value)
            case ast.BoolOp(operator, values):
                yield node, ast.BoolOp(SWAPPED[type(operator)](), values)
            case ast.UnaryOp(ast.USub() | ast.Not(), operand):
                yield node, operand
            case ast.If(test) | ast.While(test) | ast.IfExp(test):
                if isinstance(test, ast.Name | ast.Attribute | ast.Call):
                    yield test, ast.UnaryOp(ast.Not(), test)
            case ast.Constant(bool() as value):
                yield node, ast.Constant(not value)
            case ast.Constant(int() as value):
                yield node, ast.Constant(value + 1)
                yield node, ast.BinOp(ast.Constant(value), ast.Sub(), ast.Constant(1))
            case ast.Constant(float() as value):
                yield node, ast.Constant(2 * value if value else 1.0)
            case ast.Call(function, arguments, keywords):
                name = getattr(function, "attr", getattr(function, "id", ""))
                if name in RENAMED:
                    yield node, ast.Call(_renamed(function), arguments, keywords)
                plain = not any(isinstance(each, ast.Starred) for each in arguments[:2])
                if len(arguments) > 1 and plain and name not in ORDER_IS_NO_FAULT:
                    order = [arguments[1], arguments[0], *arguments[2:]]
                    yield node, ast.Call(function, order, keywords)


def _that_matter(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes whose change could change what the module does."""
    skipped: list[ast.AST | None] = []
    match tree:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            skipped = [tree.returns, *tree.decorator_list]
        case ast.ClassDef():
            skipped = [*tree.decorator_list]
        case ast.arg() | ast.AnnAssign():
            skipped = [tree.annotation]
        case ast.Assert():
            skipped = [tree.msg]
        case ast.JoinedStr() | ast.Raise():
            return
        case ast.Call(ast.Attribute(ast.Name(name))) if name in MESSAGES:
            return
        case ast.keyword("strict" | "kw_only" | "frozen"):
            return
        case ast.Subscript(ast.Name(name)) if name[0].isupper():  # a type
            return
        case ast.Call(ast.Name("cast" | "TypeVar" | "TypeAdapter")):
            return
        case ast.Assign([ast.Name(name)]) if name.endswith(SPEED) and name.isupper():
            return
    yield tree
    for child in ast.iter_child_nodes(tree):
        if child not in skipped:
            yield from _that_matter(child)


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str | bytes) or node.value is None  # or a union of types
    return isinstance(node, ast.JoinedStr)


def _renamed(function: ast.expr) -> ast.expr:
    if isinstance(function, ast.Attribute):
        return ast.Attribute(function.value, RENAMED[function.attr], function.ctx)
    assert isinstance(function, ast.Name)
    return ast.Name(RENAMED[function.id], function.ctx)


def draw(modules: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants: of each module about its share of all, one at least."""
    every = {module: mutants(module, (ROOT / module).read_text()) for module in modules}
    total = sum(map(len, every.values()))
    drawn = []
    for module, those in every.items():
        number = min(len(those), max(1, round(count * len(those) / total)))
        drawn += random.Random(f"{seed} {module}").sample(those, number)
    return drawn


def own_tests(module: str) -> list[str]:
    """Return the test files of a module."""
    path = Path(module)
    mirrored = Path("tests", path.parent, f"test_{path.name}")
    own = [str(mirrored)] if (ROOT / mirrored).is_file() else []
    return [*own, *FURTHER.get(module, [])]


class Copy:
    """A copy of the checkout, in which one module at a time is changed and tested."""

    def __init__(self, folder: Path) -> None:
        self.code = folder / "code"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.log = folder / "log"
        self.seconds = folder / "seconds.json"
        kept_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, self.code, ignore=kept_out)

    def passes(self, module: str, source: str, limit_seconds: float) -> bool:
        """Whether the module's tests pass with this source; not if they take too long."""
        path = self.code / module
        original = path.read_text()
        self._write(path, source)
        process = multiprocessing.get_context("fork").Process(
            target=self._test, args=(own_tests(module),)
        )
        process.start()
        process.join(limit_seconds)
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what its tests have started
        process.join()
        self._write(path, original)
        return process.exitcode == 0

    def _write(self, path: Path, source: str) -> None:
        path.write_text(source)
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def _test(self, tests: list[str]) -> None:
        os.setsid()
        os.chdir(self.code)
        os.environ["PYTHONPATH"] = str(self.code)  # of the tests' own processes and Ray's workers
        sys.path[0] = str(self.code)
        for name in [name for name in sys.modules if name.split(".")[0] in ("benchmarks", "tests")]:
            del sys.modules[name]
        with self.log.open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        # What tests share across processes lies beside the base, and stays for the next mutant.
        words = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--basetemp={self.temporary / 'base'}",
        ]
        os._exit(pytest.main([*words, *tests], plugins=[_QuickFirst(self.seconds)]))


class _QuickFirst:
    """Runs tests in the order of the seconds that they took when all of them last passed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self.taken: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.taken[report.nodeid] += report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK:
            self.path.write_text(json.dumps(self.known | self.taken))

    @pytest.fixture(scope="session")
    def worker_id(self) -> str:
        return "mutant"


def main() -> None:
    """Print each survivor, and a line a module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help="paths; all core modules")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(os.devnull), help="JSON lines")
    asked = parser.parse_args()
    if unknown := set(asked.modules) - set(MODULES):
        parser.error(f"no core modules: {', '.join(sorted(unknown))}")
    known = asked.output.read_text().splitlines(True) if asked.output.is_file() else []
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there
    for name in WARM:
        importlib.import_module(name)
    drawn = [
        each for each in draw(MODULES, asked.count, asked.seed) if each.module in asked.modules
    ]
    ran: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    limits: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        asked.output.open("a") as output,
    ):
        copy = Copy(Path(folder))
        for number, mutant in enumerate(drawn, start=1):
            module = mutant.module
            ran[module] += 1
            if mutant.line_of(caught=True) in known:
                caught[module] += 1
                continue
            if module not in limits:
                began = time.monotonic()
                if not copy.passes(module, (ROOT / module).read_text(), 600.0):
                    sys.exit(f"{module}: its tests fail without a change:\n{copy.log.read_text()}")
                limits[module] = 30.0 + 4 * (time.monotonic() - began)
            fails = not copy.passes(module, mutant.source, limits[module])
            caught[module] += fails
            if not fails:
                print(f"survived: {module}:{mutant.line}: {mutant.before}  ->  {mutant.after}")
            output.write(mutant.line_of(caught=fails))
            output.flush()
            print(f"{number} of {len(drawn)}, {caught.total()} caught", file=sys.stderr)
            sys.stdout.flush()
    print(f"\n{'module':50} mutants  caught")
    for module in asked.modules:
        print(f"{module:50} {ran[module]:7} {caught[module]:7}")
    share = caught.total() / ran.total()
    print(f"{'all':50} {ran.total():7} {caught.total():7}  {share:.1%}")


if __name__ == "__main__":
    main()
