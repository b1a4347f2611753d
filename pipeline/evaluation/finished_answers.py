"""A model's answers, kept where they survive the process that asked for them."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.stage import Keep


class FinishedAnswers:
    """The answers of one model, one file for each set of requests.

    A file's name is a hash of the model and of all that was asked: no answer can be taken for that
    of another model or request.

    Args:
        model: bytes that identify the model.
        folder: where the files go.
        keep: None keeps nothing.
    """

    def __init__(self, model: bytes, folder: Path, keep: Keep | None = None) -> None:
        self.model = model
        self.folder = folder
        self.kept = keep
        self.resumed = 0
        """Requests that an earlier attempt had answered."""

    def get(self, requests: Iterable[bytes], answer: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers to the requests, in their order, from `answer` unless they were kept.

        Args:
            requests: all that each answer depends on besides the model.
            answer: returns one JSON value per request.
        """
        if self.kept is None:
            return answer()
        digest = hashlib.sha256(self.model)
        for request in requests:
            digest.update(len(request).to_bytes(8, "big") + request)
        path = self.folder / f"answers-{digest.hexdigest()}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.kept.restore(path):
            kept: list[Any] = json.loads(path.read_text(encoding="utf-8"))
            self.resumed += len(kept)
            return kept
        answers = answer()
        path.write_text(json.dumps(answers), encoding="utf-8")
        self.kept.keep(path)
        return answers
