"""lm-eval's language model on a model in memory, which computes what requests share only once."""

import copy
import hashlib
import inspect
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.perplexity import LOGITS
from pipeline.models.chat import TEMPLATE_ARGUMENTS
from pipeline.models.nonfinite import nonfinite_error
from pipeline.models.output_layer import MOVED, PROBE_TOKENS, OutputLayer
from pipeline.models.positions import NONE, LengthDependence
from pipeline.models.vocabulary import end_ids
from pipeline.progress import report

FAMILY_TOKENS = 64
"""Documents that begin with so many tokens in common, few-shot examples as a rule, share them."""

WORTHWHILE_TOKENS = 256
"""Tokens that are worth a forward pass: fewer are computed again, or padded, instead."""

CHUNKS = 200
"""Parts that requests are answered in, of a batch each at least: the most that a crash costs is
the one in work."""

GENERATION_BATCH = 32
"""Contexts that are continued together."""

GENERATION_SEED = 1234
"""Before each batch of generations, for tasks that sample; lm-eval's own."""

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
"""Layers of a `DynamicCache` whose rows are chosen and repeated as a whole. Those of linear
attention, state spaces and convolutions are not among them, nor are other caches: what they inherit
leaves states as they are, or fails."""

Owner = tuple[Hashable, ...]
"""Of a request: its task, its document, and what else tells apart whose beginnings it may share."""


class Request(NamedTuple):
    """Token ids, and how many of the last are to be scored."""

    ids: tuple[int, ...]
    scored: int

    @property
    def input(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return self.ids[:-1]

    @property
    def given(self) -> int:
        """Tokens before the last one that nothing is predicted from yet."""
        return len(self.ids) - self.scored - 1

    def to_bytes(self) -> bytes:
        """All of it, for a hash."""
        return np.array([self.scored, *self.ids], dtype=np.int64).tobytes()


@dataclass
class Document:
    """The requests of one document, and the beginning that all of them have in common."""

    requests: dict[int, Request]
    """By number; all of one group of `positions`."""
    positions: LengthDependence
    rows: dict[tuple[int, ...], list[int]] = field(init=False)
    """What the model reads to the numbers of the requests that it answers."""
    shared: int = field(init=False)
    """Tokens in common from which nothing is to be predicted."""
    longest: int = field(init=False)
    """Tokens that the model reads for the longest request."""

    def __post_init__(self) -> None:
        self.rows = defaultdict(list)
        for number, request in self.requests.items():
            self.rows[request.input].append(number)
        common = _beginning(list(self.rows))
        self.longest = max(map(len, self.rows))
        shared = min(len(common), *(request.given for request in self.requests.values()))
        self.shared = shared if self.positions.group(shared) == self.group else 0

    @property
    def group(self) -> Hashable:
        """Of texts that are read with the same positions."""
        return self.positions.group(self.longest)


class Batch(NamedTuple):
    """Documents for one forward pass over their shared beginnings and one over the rest."""

    documents: list[Document]
    family: tuple[int, ...]
    """Tokens that all documents of a family begin with."""
    shared: int
    """Tokens of each document that are computed once for its requests, the family's included."""


class SharingLM(HFLM):  # type: ignore[misc]
    """lm-eval's `HFLM` with its own way of answering: same requests, same tokens, same numbers.

    Requests of one document share the beginning that they have in common (question, premise,
    choices that begin alike), and documents the few-shot examples that stand before all of them:
    each is computed once and its keys and values are used again. Batches are made of documents of
    similar length up to a budget of tokens.

    A model that keeps a running state in any layer, or gives out no keys and values, gets every
    request whole. Where positions depend on the length of the text, requests share a batch or a
    beginning only if their lengths give both the same positions.

    Args:
        model: a causal language model, in evaluation mode.
        batch_tokens: tokens of a forward pass.
        answers: keeps what is answered.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_tokens: int, answers: FinishedAnswers
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=GENERATION_BATCH,
            chat_template_args=dict(TEMPLATE_ARGUMENTS),
        )
        # Of the checkpoint's own settings only the ends count: a penalty would change answers.
        ends = end_ids(model.generation_config, tokenizer)
        model.generation_config = GenerationConfig(eos_token_id=ends or None)
        self.batch_tokens = batch_tokens
        self.answers = answers
        self.asked = 0
        self._layer = OutputLayer(model)
        self._keeps_logits = (
            not self._layer.chunked
            and "logits_to_keep" in inspect.signature(model.forward).parameters
        )
        first = torch.tensor([[self.prefix_token_id]], device=self.device)
        with torch.inference_mode():
            self._dtype = model(first, use_cache=False).logits.dtype
        self.shares = not getattr(model, "_is_stateful", False)
        if self.shares:  # as far as its class tells
            cache = self._forward([(self.prefix_token_id,)], None, 1)[1]
            self.shares = type(cache) is DynamicCache and all(
                type(layer) in KEYS_AND_VALUES for layer in cache.layers
            )
        self._family: tuple[int, ...] = ()
        self._family_cache: Any = None

    # ------------------------------------------------------------------------ lm-eval's interface

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation given its context, and whether it is the likeliest of all."""
        pairs = self._encoded_pairs([request.args for request in requests])
        owners = [(request.task_name, request.doc_id) for request in requests]
        return self._answer(owners, pairs)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each whole text, in windows as long as the model takes that do not overlap."""
        owners: list[Owner] = []
        pairs: list[tuple[list[int], list[int]]] = []
        numbers: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in map(make_disjoint_window, windows):
                owners.append((request.task_name, request.doc_id, len(pairs)))
                pairs.append(pair)
                numbers.append(number)
        totals = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(numbers, self._answer(owners, pairs), strict=True):
            totals[number] += log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """HFLM's generations, kept batch by batch; one at a time where padding would move them."""
        self.asked += len(requests)
        texts: list[str] = []
        alone = self._layer.lengths != NONE or sees_padding(self.model)
        size = 1 if alone else GENERATION_BATCH
        for start in range(0, len(requests), size):
            part = requests[start : start + size]

            def generate(part: Sequence[Any] = part) -> list[str]:
                return self._generated(part)

            described = [json.dumps(request.args, sort_keys=True).encode() for request in part]
            texts += self.answers.get(described, generate)
            report(len(texts), len(requests), "requests")
        return texts

    def _generated(self, part: Sequence[Any]) -> list[str]:
        """HFLM's generations of one batch.

        Raises:
            InputError: if a task asks for as many tokens as the model takes.
            NonFiniteError: if logits are NaN, with the document.
        """
        torch.manual_seed(GENERATION_SEED)
        for request in part:
            asked = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if asked >= self.max_length:
                remedy = (
                    f"generates {asked} tokens, and the model takes {self.max_length} with the "
                    "prompt: drop the task, or take another model"
                )
                raise InputError("tasks", request.task_name, remedy)
        try:
            found: list[str] = super().generate_until(part, disable_tqdm=True)
        except NonFiniteError as error:
            if len(part) > 1:  # to name the document
                return [text for request in part for text in self._generated([request])]
            name = document_name((part[0].task_name, part[0].doc_id))
            raise NonFiniteError(f"{name}: {error}") from error
        return found

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Tensor:
        refuse = LogitsProcessorList([self._refuse_non_finite])
        found: Tensor = super()._model_generate(
            context, *arguments, logits_processor=refuse, **options
        )
        return found

    def _refuse_non_finite(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """Pass on the logits `[rows, vocabulary]` of the next tokens."""
        spoilt = ~scores.amax(dim=-1).isfinite()  # NaN or infinity; -inf rules a token out
        if bool(spoilt.any()):
            row = token_ids[int(spoilt.nonzero()[0])]
            raise nonfinite_error("generation", self.model, row.tolist())
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._answer([("unknown", number) for number in range(len(pairs))], pairs)

    # ------------------------------------------------------------------------------- tokenisation

    def _encoded_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """As `TemplateLM.loglikelihood` splits them, each text tokenised once."""
        split = []
        for context, continuation in pairs:
            kept = context.rstrip()
            split.append((kept, context[len(kept) :] + continuation) if context else ("", ""))
        wholes = [kept + rest for kept, rest in split]
        ids = self._encoded({*wholes, *(kept for kept, _ in split)} - {""})
        encoded = []
        for (context, continuation), (kept, _), whole in zip(pairs, split, wholes, strict=True):
            if context:
                # of a context of white space alone nothing is left, which lm-eval tokenises too
                before = ids[kept] if kept else self.tok_encode("")
                encoded.append((before, ids[whole][len(before) :]))
                continue
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                encoded.append((tokens[:1], tokens[1:]))
            else:
                encoded.append(([self.prefix_token_id], tokens))
        return encoded

    def _encoded(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """As `HFLM.tok_encode` does one by one."""
        first = self.tokenizer.decode(self.prefix_token_id)
        ids: dict[str, list[int]] = {}
        ordered = sorted(texts)
        for begun, part in (
            (begun, [text for text in ordered if has_bos_prefix(text, first) == begun])
            for begun in (False, True)
        ):
            if part:
                options = {"add_special_tokens": False} if begun else {}
                encoded = self.tokenizer(part, verbose=False, **options)["input_ids"]
                ids |= dict(zip(part, encoded, strict=True))
        return ids

    # ------------------------------------------------------------------------------------ answers

    def _answer(
        self, owners: Sequence[Owner], pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest.

        Args:
            owners: of each pair; those of one owner may share their beginnings.
            pairs: context and continuation.

        Raises:
            InputError: if lm-eval cannot score a pair either; see `check_pair`.
            NonFiniteError: if a log-likelihood is NaN or infinite.
        """
        self.asked += len(pairs)
        positions = self._layer.lengths
        documents: dict[Hashable, dict[int, Request]] = defaultdict(dict)
        for number, (owner, (context, continuation)) in enumerate(zip(owners, pairs, strict=True)):
            check_pair(owner, context, continuation, self.max_length)
            ids = tuple(context + continuation)[-(self.max_length + 1) :]
            part = (owner, positions.group(len(ids) - 1)) if self.shares else number
            documents[part][number] = Request(ids, len(continuation))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        parts = [Document(requests, positions) for requests in documents.values()]
        batches = self._batches(parts)
        done = 0
        for chunk in _chunks(batches, len(pairs) / CHUNKS):
            asked = {
                number: request
                for batch in chunk
                for document in batch.documents
                for number, request in document.requests.items()
            }

            def answer(chunk: list[Batch] = chunk, asked: dict[int, Request] = asked) -> list[Any]:
                answers: dict[int, tuple[float, bool]] = {}
                for batch in chunk:
                    answers.update(self._run(batch))
                for number, request in asked.items():
                    if not math.isfinite(answers[number][0]):
                        what = document_name(owners[number])
                        raise nonfinite_error(what, self.model, request.input)
                return [answers[number] for number in asked]

            requests = [request.to_bytes() for request in asked.values()]
            for number, (log_likelihood, greedy) in zip(
                asked, self.answers.get(requests, answer), strict=True
            ):
                found[number] = (log_likelihood, greedy)
            done += len(asked)
            report(done, len(pairs), "requests")
        self._family, self._family_cache = (), None
        return found

    def _batches(self, documents: list[Document]) -> Iterator[Batch]:
        """Documents of one family and group together, long ones first."""
        heads = [(_head(document), document.group) for document in documents]
        frequent = Counter(heads)
        families: dict[tuple[tuple[int, ...], Hashable], list[Document]] = defaultdict(list)
        for (head, group), document in zip(heads, documents, strict=True):
            known = self.shares and frequent[head, group] > 1
            families[head if known else (), group].append(document)
        for (head, group), members in families.items():
            common = _beginning([next(iter(one.rows)) for one in members]) if head else ()
            family = common[: min(one.shared for one in members)]
            if self._layer.lengths.group(len(family)) != group:
                family = ()
            several = [document for document in members if len(document.rows) > 1]
            single = [document for document in members if len(document.rows) == 1]
            several.sort(key=lambda document: (-document.shared, -document.longest))
            single.sort(key=lambda document: -document.longest)
            for part in _similar(several, self._fits, lambda document: document.shared):
                shared = min(document.shared for document in part)
                yield Batch(part, family, shared)
            for part in _similar(single, self._fits, lambda document: document.longest):
                yield Batch(part, family, len(family))

    def _fits(self, documents: Sequence[Document]) -> bool:
        rows = sum(len(document.rows) for document in documents)
        longest = max(document.longest for document in documents)
        predicted = longest - min(document.shared for document in documents)
        vocabulary = self.model.config.get_text_config().vocab_size
        logits = 0 if self._layer.chunked else rows * predicted * vocabulary
        return rows * longest <= self.batch_tokens and logits <= LOGITS

    def _run(self, batch: Batch) -> dict[int, tuple[float, bool]]:
        """By number, what `_answer` gives."""
        documents, begun = batch.documents, len(batch.family)
        rows = [row for document in documents for row in document.rows]
        owners = [place for place, document in enumerate(documents) for _ in document.rows]
        first = [next(iter(document.rows))[begun : batch.shared] for document in documents]
        saved = (len(rows) - len(documents)) * (batch.shared - begun)
        if saved > WORTHWHILE_TOKENS:
            cache = self._forward(first, self._begun(batch.family, len(documents)), 1)[1]
            cache.batch_select_indices(torch.tensor(owners, device=self.device))
            begun = batch.shared
        else:
            cache = self._begun(batch.family, len(rows))
        rest = [row[begun:] for row in rows]
        longest = max(map(len, rest))
        firsts = [
            request.given - begun
            for document in documents
            for request in document.requests.values()
        ]
        states, _ = self._forward(rest, cache, longest - min(firsts))
        begun += longest - states.shape[1]  # tokens of a row before its first state
        numbers: list[int] = []
        scored: list[int] = []
        places: list[tuple[int, int]] = []
        targets: list[int] = []
        row = 0
        for document in documents:
            for answered in document.rows.values():
                for number in answered:
                    request = document.requests[number]
                    start = request.given - begun
                    numbers.append(number)
                    scored.append(request.scored)
                    places += [(row, start + place) for place in range(request.scored)]
                    targets += request.ids[-request.scored :]
                row += 1
        values, greedy = (
            torch.split(tokens, scored) for tokens in self._token_answers(states, places, targets)
        )
        return {
            number: (float(own.sum()), bool(alike.all()))
            for number, own, alike in zip(numbers, values, greedy, strict=True)
        }

    @torch.inference_mode()
    def _token_answers(
        self, states: Tensor, places: list[tuple[int, int]], targets: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each target at its place (row, column), and whether it is the
        likeliest token there, both [targets].

        They are rounded to the type of the model's logits before they are compared, as in lm-eval:
        of tokens that are then alike the first is the likeliest.
        """
        rows, columns = torch.tensor(places).unbind(dim=1)
        wanted = torch.tensor(targets, device=states.device)
        values, greedy = [], []
        for part, logits in self._layer.logits(states, rows, columns):
            logs = logits.log_softmax(dim=-1).to(self._dtype)
            values.append(logs.gather(1, wanted[part, None]).squeeze(1))
            greedy.append(logs.argmax(dim=-1) == wanted[part])
        return torch.cat(values).cpu(), torch.cat(greedy).cpu()

    def _begun(self, family: tuple[int, ...], rows: int) -> Any:
        """Keys and values of the family's tokens for so many rows; None where there are none."""
        if not family:
            return None
        if family != self._family:
            self._family, self._family_cache = family, self._forward([family], None, 1)[1]
        cache = copy.deepcopy(self._family_cache)
        cache.batch_repeat_interleave(rows)
        return cache

    @torch.inference_mode()
    def _forward(
        self, rows: Sequence[tuple[int, ...]], cache: Any, positions: int
    ) -> tuple[Tensor, Any]:
        """States of the last positions at least, as `OutputLayer.forward` gives them, and keys and
        values.

        Rows are padded on the right, where nothing that counts looks.
        """
        longest = max(map(len, rows))
        ids = torch.tensor(
            [[*row, *itertools.repeat(0, longest - len(row))] for row in rows], device=self.device
        )
        options: dict[str, Any] = {"use_cache": self.shares}
        if cache is not None:
            options["past_key_values"] = cache
        if self._keeps_logits:
            options["logits_to_keep"] = positions
        return self._layer.forward(input_ids=ids, **options)


@torch.inference_mode()
def sees_padding(model: Any) -> bool:
    """Whether a text is continued in another way if padding stands before it, as in some models
    with a running state."""
    ids = torch.arange(1, PROBE_TOKENS, device=model.device)[None]
    padding = torch.zeros_like(ids)
    options = {"min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    alone, padded = (
        torch.stack(
            model.generate(
                torch.cat([*before, ids], dim=1),
                attention_mask=torch.cat([*before, torch.ones_like(ids)], dim=1),
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            ).logits
        )
        for before in ([], [padding])
    )
    return not bool((alone - padded).abs().mean() <= MOVED * alone.std())


def check_pair(
    owner: Owner, context: Sequence[int], continuation: Sequence[int], longest: int
) -> None:
    """Check that a continuation can be scored.

    Args:
        context: tokens that stand before it.
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
    """Check the log-likelihoods that requests have got.

    Raises:
        NonFiniteError: if one is NaN or infinite.
    """
    for request, answer in zip(requests, answers, strict=True):
        value = answer if isinstance(answer, float | int) else answer[0]
        if not math.isfinite(value):
            name = document_name((request.task_name, request.doc_id))
            raise NonFiniteError(f"{name}: its log-likelihood is {value:g}")


def document_name(owner: Owner) -> str:
    """What errors call a request's document."""
    return f"{owner[0]}, document {owner[1]}"


def fingerprint(arguments: Iterable[Any]) -> str:
    """16 hexadecimal digits that stand for a document's requests, as lm-eval words them."""
    text = json.dumps(list(arguments), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _beginning(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all rows begin with: what the first and the last in order do."""
    first, last = min(rows), max(rows)
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:place]
    return first


def _head(document: Document) -> tuple[int, ...]:
    """By what families are told apart; empty where a document shares too little."""
    if document.shared < FAMILY_TOKENS:
        return ()
    return next(iter(document.rows))[:FAMILY_TOKENS]


def _similar(
    documents: Sequence[Document],
    fits: Callable[[Sequence[Document]], bool],
    length: Callable[[Document], int],
) -> Iterator[list[Document]]:
    """Documents in their order, descending by length, in parts that fit and differ little."""
    part: list[Document] = []
    for document in documents:
        if part:
            rows = sum(len(one.rows) for one in part)
            wasted = rows * (length(part[0]) - length(document))
            if wasted > WORTHWHILE_TOKENS or not fits([*part, document]):
                yield part
                part = []
        part.append(document)
    if part:
        yield part


def _chunks(batches: Iterable[Batch], requests: float) -> Iterator[list[Batch]]:
    """Batches in their order, of at least so many requests together."""
    chunk: list[Batch] = []
    count = 0
    for batch in batches:
        chunk.append(batch)
        count += sum(len(document.requests) for document in batch.documents)
        if count >= requests:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk
