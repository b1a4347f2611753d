"""lm-eval's language model on a model in memory; what requests share is computed once."""

import copy
import inspect
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

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
from pipeline.evaluation.request_checks import Owner, check_pair, document_name
from pipeline.evaluation.shared_beginnings import (
    Batch,
    DocumentRequests,
    ScoredRequest,
    chunked_batches,
    request_batches,
)
from pipeline.models.chat import TEMPLATE_ARGUMENTS
from pipeline.models.nonfinite import nonfinite_error
from pipeline.models.output_layer import MOVED, PROBE_TOKENS, OutputLayer, joined
from pipeline.models.positions import NONE
from pipeline.models.vocabulary import end_ids
from pipeline.progress import report

CHUNKS = 200
"""Parts that requests are answered in, of at least one batch each. A crash costs one part."""

GENERATION_BATCH = 32
"""Contexts that are continued in one batch."""

GENERATION_SEED = 1234
"""Seed of each batch of generations, for tasks that sample; lm-eval's own."""

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
"""Layers of a `DynamicCache` whose rows can be selected and repeated. Layers of linear attention,
state spaces and convolutions inherit methods that leave their states as they are, or fail."""


class SharingLM(HFLM):  # type: ignore[misc]
    """lm-eval's `HFLM` with faster answers: same requests, same tokens, same numbers.

    The requests of a document share their common beginning (question, premise, choices that begin
    alike), and documents share the few-shot examples before them: each is computed once and its
    keys and values are used again. A batch holds documents of similar length up to a budget of
    tokens.

    A model with a running state in any layer, without keys and values, or with its decoder layers
    in files reads every request whole; the last kind does not generate. If positions depend on the
    length of the text, requests share a batch or a beginning only if they have the same positions.

    Args:
        model: a causal language model, in evaluation mode.
        batch_tokens: most tokens of a forward pass, padding included.
        answers: keeps the answers.
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
        # Only the end tokens of the checkpoint's settings count: a penalty would change answers.
        ends = end_ids(model.generation_config, tokenizer)
        model.generation_config = GenerationConfig(eos_token_id=ends or None)
        self.answers = answers
        self.asked = 0
        self._layer = OutputLayer(model)
        self.batch_tokens = self._layer.batch_tokens(batch_tokens)
        self._keeps_logits = (
            not self._layer.chunked
            and "logits_to_keep" in inspect.signature(model.forward).parameters
        )
        self._dtype = self._layer.logits_dtype()
        self.shares = not (self._layer.streamed or getattr(model, "_is_stateful", False))
        if self.shares:  # its class does not rule it out; its cache may
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
        """Return the log-likelihood of each continuation, and whether it is the likeliest one."""
        pairs = self._encoded_pairs([request.args for request in requests])
        owners = [(request.task_name, request.doc_id) for request in requests]
        return self._answer(owners, pairs)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, in windows that do not overlap."""
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
        """Return HFLM's generations, kept batch by batch; one at a time if padding changes them.

        Raises:
            InputError: if the model's decoder layers are in files, or as `_generated` does.
        """
        if self._layer.streamed and requests:
            remedy = (
                "generates, and the model, too large for memory, is read layer by layer: take "
                "evaluate.backend vllm, give it more memory, or drop the task"
            )
            raise InputError("tasks", requests[0].task_name, remedy)
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
        """Return HFLM's generations of one batch.

        Raises:
            InputError: if a task asks for as many tokens as the model can read.
            NonFiniteError: if logits are NaN or infinite, with the document.
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
        """Return the logits `[rows, vocabulary]` of the next tokens, if none is NaN or infinite."""
        broken = ~scores.amax(dim=-1).isfinite()  # NaN or infinity; -inf rules a token out
        if bool(broken.any()):
            row = token_ids[int(broken.nonzero()[0])]
            raise nonfinite_error("generation", self.model, row.tolist())
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._answer([("unknown", number) for number in range(len(pairs))], pairs)

    # ------------------------------------------------------------------------------- tokenisation

    def _encoded_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise pairs as `TemplateLM.loglikelihood` does, each text once."""
        split = []
        for context, continuation in pairs:
            kept = context.rstrip()
            split.append((kept, context[len(kept) :] + continuation) if context else ("", ""))
        wholes = [kept + rest for kept, rest in split]
        ids = self._encoded({*wholes, *(kept for kept, _ in split)} - {""})
        encoded = []
        for (context, continuation), (kept, _), whole in zip(pairs, split, wholes, strict=True):
            if context:
                # a context of white space leaves the empty text, which lm-eval tokenises too
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
        """Tokenise texts as `HFLM.tok_encode` does one by one."""
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
        """Return the log-likelihood of each continuation, and whether it is the likeliest one.

        Args:
            owners: one per pair; pairs of one owner may share their beginnings.
            pairs: contexts and continuations.

        Raises:
            InputError: if a pair cannot be scored; see `check_pair`.
            NonFiniteError: if a log-likelihood is NaN or infinite.
        """
        self.asked += len(pairs)
        positions = self._layer.lengths
        documents: dict[Hashable, dict[int, ScoredRequest]] = defaultdict(dict)
        for number, (owner, (context, continuation)) in enumerate(zip(owners, pairs, strict=True)):
            check_pair(owner, context, continuation, self.max_length)
            ids = tuple(context + continuation)[-(self.max_length + 1) :]
            part = (owner, positions.group(len(ids) - 1)) if self.shares else number
            documents[part][number] = ScoredRequest(ids, len(continuation))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        parts = [DocumentRequests(requests, positions) for requests in documents.values()]
        batches = request_batches(parts, positions, self._fits, self.shares)
        chunks = list(chunked_batches(batches, len(pairs) / CHUNKS))
        asked = [
            {
                number: request
                for batch in chunk
                for document in batch.documents
                for number, request in document.requests.items()
            }
            for chunk in chunks
        ]

        def answer(missing: list[int]) -> Iterator[list[Any]]:
            by_batch = self._run([batch for place in missing for batch in chunks[place]])
            for place in missing:
                answers: dict[int, tuple[float, bool]] = {}
                for _ in chunks[place]:
                    answers.update(next(by_batch))
                for number, request in asked[place].items():
                    if not math.isfinite(answers[number][0]):
                        what = document_name(owners[number])
                        raise nonfinite_error(what, self.model, request.input)
                yield [answers[number] for number in asked[place]]

        requests = [[request.to_bytes() for request in chunk.values()] for chunk in asked]
        done = 0
        for place, answers in self.answers.each(requests, answer):
            for number, (log_likelihood, greedy) in zip(asked[place], answers, strict=True):
                found[number] = (log_likelihood, greedy)
            done += len(asked[place])
            report(done, len(pairs), "requests")
        self._family, self._family_cache = (), None
        return found

    def _fits(self, documents: Sequence[DocumentRequests]) -> bool:
        rows = sum(len(document.rows) for document in documents)
        longest = max(document.longest for document in documents)
        shared = 0 if self._layer.streamed else min(document.shared for document in documents)
        predicted = longest - shared
        vocabulary = self.model.config.get_text_config().vocab_size
        logits = 0 if self._layer.chunked else rows * predicted * vocabulary
        return rows * longest <= self.batch_tokens and logits <= LOGITS

    def _run(self, batches: list[Batch]) -> Iterator[dict[int, tuple[float, bool]]]:
        """Yield for each batch what `_answer` returns, by request number."""
        if not self._layer.streamed:
            yield from map(self._run_sharing, batches)
            return
        states = self._layer.states({"input_ids": self._padded(batch.rows)} for batch in batches)
        for batch, own in zip(batches, states, strict=True):
            yield self._read(batch, own, 0)

    def _run_sharing(self, batch: Batch) -> dict[int, tuple[float, bool]]:
        documents, begun, rows = batch.documents, len(batch.family), batch.rows
        if batch.is_worth_sharing:
            first = [next(iter(document.rows))[begun : batch.shared] for document in documents]
            owners = [place for place, document in enumerate(documents) for _ in document.rows]
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
        return self._read(batch, states, begun + longest - states.shape[1])

    def _read(self, batch: Batch, states: Tensor, begun: int) -> dict[int, tuple[float, bool]]:
        """Return a batch's answers by request number.

        Args:
            states: the last states of each row, `[rows, tokens, hidden]`.
            begun: tokens of a row before its first state.
        """
        numbers: list[int] = []
        scored: list[int] = []
        places: list[tuple[int, int]] = []
        targets: list[int] = []
        row = 0
        for document in batch.documents:
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
        """Return the log-likelihood of each target at its place (row, column), and whether it is
        the likeliest token there, both `[targets]`.

        As in lm-eval, they are rounded to the type of the model's logits before they are compared;
        of equal ones the first token is the likeliest.
        """
        rows, columns = torch.tensor(places).unbind(dim=1)
        wanted = torch.tensor(targets, device=states.device)

        def answers(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            logs = logits.log_softmax(dim=-1).to(self._dtype)
            values = logs.gather(1, wanted[part, None]).squeeze(1)
            return values, logs.argmax(dim=-1) == wanted[part]

        parts = itertools.starmap(answers, self._layer.logits(states, rows, columns))
        values, greedy = joined(parts, len(rows))
        return values.cpu(), greedy.cpu()

    def _begun(self, family: tuple[int, ...], rows: int) -> Any:
        """Return the keys and values of the family's tokens for some rows; None without tokens."""
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
        """Return the states of at least the last positions, and keys and values."""
        options: dict[str, Any] = {"use_cache": self.shares}
        if cache is not None:
            options["past_key_values"] = cache
        if self._keeps_logits:
            options["logits_to_keep"] = positions
        return self._layer.forward(input_ids=self._padded(rows), **options)

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Return token ids `[rows, tokens]`, padded on the right, where no token looks."""
        longest = max(map(len, rows))
        return torch.tensor(
            [[*row, *itertools.repeat(0, longest - len(row))] for row in rows], device=self.device
        )


@torch.inference_mode()
def sees_padding(model: Any) -> bool:
    """Return whether padding before a text changes how it is continued, as in some models with a
    running state."""
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
