"""Which faults are planted in a module, and which of its tests are run."""

from pathlib import Path

import pytest

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
