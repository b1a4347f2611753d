"""Which faults are planted in a module, and which of its tests are run."""

import sys
from pathlib import Path

import pytest

import benchmarks.mutants
from benchmarks.mutants import MODULES, ROOT, draw, mutants, own_tests


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a < b", ["(a <= b)"]),
        ("a - b", ["(a + b)", "(b - a)"]),
        ("a and b", ["(a or b)"]),
        ("not a", ["(a)"]),
        ("x = 3", ["x = (4)", "x = (3 - 1)"]),
        ("x = True", ["x = (False)"]),
        ("f(a, b)", ["(f(b, a))"]),
        ("min(a, b)", ["(max(a, b))"]),
        ("a += b", ["a -= b"]),
        ("if a: pass", ["if (not a): pass"]),
        ("'ü'; a < b", ["'ü'; (a <= b)"]),
    ],
)
def test_each_kind_of_fault_is_planted(source: str, changed: list[str]) -> None:
    assert [mutant.source for mutant in mutants("module.py", source)] == changed


@pytest.mark.parametrize(
    "source",
    [
        '"""A text."""',
        "raise ValueError(1 < 2)",
        "logger.info(a < b)",
        "def f(a: int | None = None) -> int | None: ...",
        "WAIT_SECONDS = 3.0",
        'f"{a - b}"',
        "zip(a, b, strict=True)",
    ],
)
def test_what_changes_no_result_is_left_alone(source: str) -> None:
    assert mutants("module.py", source) == []


def test_a_draw_is_of_all_modules_and_the_same_for_a_seed() -> None:
    drawn = draw(MODULES, 60, 0)
    with_code = {name for name in MODULES if mutants(name, (ROOT / name).read_text())}
    assert {mutant.module for mutant in drawn} == with_code
    assert drawn == draw(MODULES, 60, 0) != draw(MODULES, 60, 1)


def test_every_core_module_has_tests() -> None:
    for module in MODULES:
        assert own_tests(module), module
        assert all((ROOT / Path(path)).is_file() for path in own_tests(module)), module


def test_a_second_run_leaves_out_what_was_caught_and_tries_survivors_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "cluster/leases.py"
    original = (ROOT / module).read_text()
    tried: list[str] = []

    class Tests:
        def __init__(self, folder: Path) -> None: ...

        def passes(self, module: str, source: str, limit_seconds: float) -> bool:
            if source != original:
                tried.append(source)
            return source == original or source == survivor.source

    monkeypatch.setattr(benchmarks.mutants, "Copy", Tests)
    monkeypatch.setattr(benchmarks.mutants, "WARM", ())
    words = ["mutants", "--output", str(tmp_path / "results.jsonl"), module]
    monkeypatch.setattr(sys, "argv", words)
    drawn = [each for each in draw(MODULES, 200, 0) if each.module == module]
    survivor = drawn[1]
    for expected in (drawn, [survivor]):
        tried.clear()
        benchmarks.mutants.main()
        assert tried == [each.source for each in expected]
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith(f"survived: {module}:{survivor.line}: ")
        assert printed[-1].split()[:3] == ["all", str(len(drawn)), str(len(drawn) - 1)]
