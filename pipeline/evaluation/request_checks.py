"""Checks of lm-eval's requests and of their answers; errors name task and document."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from pipeline.errors import InputError, NonFiniteError

Owner = tuple[Hashable, ...]
"""A request's task and document, and what else separates requests that may share a beginning."""


def document_name(owner: Owner) -> str:
    """Return what errors call a request's document."""
    return f"{owner[0]}, document {owner[1]}"


def check_pair(
    owner: Owner, context: Sequence[int], continuation: Sequence[int], longest: int
) -> None:
    """Check that a continuation can be scored.

    Args:
        context: tokens before the continuation.
        longest: tokens that a continuation may have.

    Raises:
        InputError: if not. lm-eval stops there too, by an assertion.
    """
    name = document_name(owner)
    if not context:
        remedy = "its context has no token, and the tokenizer begins no text: nothing stands before"
    elif not continuation:
        remedy = "a choice adds no token to its context: it is empty, or its characters merge"
    elif len(continuation) > longest:
        remedy = f"a choice of {len(continuation)} tokens is longer than the model's {longest}"
    else:
        return
    raise InputError(
        "tasks", name, f"{remedy}; lm-eval cannot score it either: drop it or the task"
    )


def check_finite(requests: Iterable[Any], answers: Iterable[tuple[float, bool] | float]) -> None:
    """Check that the log-likelihoods of requests are finite.

    Raises:
        NonFiniteError: if one is NaN or infinite.
    """
    for request, answer in zip(requests, answers, strict=True):
        value = answer if isinstance(answer, float | int) else answer[0]
        if not math.isfinite(value):
            name = document_name((request.task_name, request.doc_id))
            raise NonFiniteError(f"{name}: its log-likelihood is {value:g}")
