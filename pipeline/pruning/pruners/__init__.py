"""The pruners: each a pure function of one matrix and its statistics, in a module of its own.

A pruner is two files: its options, a class in `pipeline/specs/pruners.py`; and the module here that
has their name, whose function `pruner` makes a `MatrixPruner` of them.
"""

import importlib

from pipeline.pruning.pruners.base import MatrixPruner
from pipeline.specs import Pruner


def pruner_for(options: Pruner) -> MatrixPruner:
    """Return the pruner with these options, from the module with their name."""
    module = importlib.import_module(f"{__name__}.{options.name.replace('-', '_')}")
    found: MatrixPruner = module.pruner(options)
    return found
