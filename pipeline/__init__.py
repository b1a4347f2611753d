"""The science: from a model and text to a calibration set, a pruned model and its evaluation.

As a library, in a notebook:

    import pipeline

    model = pipeline.load("path/to/model")
    windows = pipeline.windows(model, "texts.jsonl", nsamples=32, seqlen=512)
    pipeline.prune(model, windows, "wanda", sparsity=0.5)
    pipeline.evaluate(model, perplexity={"held out": "heldout.jsonl"})

These functions stand in `pipeline.library` and are imported when they are first asked for, since
planning a grid reads `pipeline.specs` and must not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.library import (
        LanguageModel,
        draw,
        evaluate,
        filter,
        generate,
        hidden_states,
        load,
        prune,
        score,
        windows,
    )

__all__ = [
    "LanguageModel",
    "draw",
    "evaluate",
    "filter",
    "generate",
    "hidden_states",
    "load",
    "prune",
    "score",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import library

    return getattr(library, name)


def __dir__() -> list[str]:
    return __all__
