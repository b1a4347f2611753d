"""A model's answers, kept where they survive the process that asked for them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        if keep is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.resumed = 0
        """Requests that an earlier attempt had answered."""

    def get(self, requests: Iterable[bytes], answer: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers to the requests, in their order, from `answer` unless they were kept.

        Args:
            requests: all that each answer depends on besides the model.
            answer: returns one JSON value per request.
        """
        ((_, answers),) = self.each([requests], lambda missing: (answer() for _ in missing))
        return answers

    def each(
        self,
        parts: Sequence[Iterable[bytes]],
        answer: Callable[[list[int]], Iterator[list[Any]]],
    ) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number and the answers of each part of the requests, the kept ones first.

        Args:
            parts: requests as `get` takes them.
            answer: yields the answers of each part whose number it is given; each is kept at once.
        """
        missing: list[int] = []
        paths = [self._path(requests) for requests in parts]
        for number, path in enumerate(paths):
            if self.kept is not None and self.kept.restore(path):
                answers: list[Any] = json.loads(path.read_text(encoding="utf-8"))
                self.resumed += len(answers)
                yield number, answers
            else:
                missing.append(number)
        for number, answers in zip(missing, answer(missing), strict=True):
            if self.kept is not None:
                paths[number].write_text(json.dumps(answers), encoding="utf-8")
                self.kept.keep(paths[number])
            yield number, answers

    def _path(self, requests: Iterable[bytes]) -> Path:
        digest = hashlib.sha256(self.model)
        for request in requests:
            digest.update(len(request).to_bytes(8, "big") + request)
        return self.folder / f"answers-{digest.hexdigest()}.json"
