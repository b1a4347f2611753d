"""How the module of a stage is imported."""

import importlib.util
import sys

import pytest

from jobs.stages import _hidden


def test_a_hidden_package_seems_not_to_be_installed_only_within_the_block() -> None:
    name = "sunau"  # of the standard library, and nobody's
    sys.modules.pop(name, None)
    with _hidden(name):
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert importlib.util.find_spec(name) is not None
    assert name not in sys.modules


def test_a_package_that_is_imported_already_stays() -> None:
    with _hidden("json"):
        assert importlib.import_module("json") is sys.modules["json"]
    assert sys.modules["json"] is not None
