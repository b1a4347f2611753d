"""Generation by vLLM: a shard's samples are requests that are handed over together.

The engine runs inside this process. So all requests of a shard are there before its first step,
and which of them share a batch is the same every time; and an engine that crashes takes the
process with it, which is seen and mended, rather than leaving one that waits for it.
"""

import atexit
import functools
import gc
import importlib.util
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import EngineDiedError, InputError, NonFiniteError
from pipeline.generation.sampling import Sampling, request_seed
from pipeline.generation.transformers_engine import device_name
from pipeline.models.checkpoint import write_checkpoint
from pipeline.models.inspection import (
    allows_pickle,
    check_checkpoint,
    checkpoint_location,
    trusts_code,
)
from pipeline.models.loading import load_configs, model_dtype
from pipeline.models.vocabulary import embedding_rows
from pipeline.progress import phase, report
from pipeline.specs import GenerateSpec, Model, PruneSpec, Vllm
from pipeline.stage import Artifacts

CPU_BLOCK_TOKENS = 128
"""Tokens of a block of the key-value cache on a CPU: a sample takes whole blocks."""

STARTING = "starting vLLM: it loads the model and compiles"
"""The phase of an engine's start, which takes minutes on some machines."""
TOP_K_TOP_P = "calprune_top_k_top_p"
"""Among the `extra_args` of a request on a CPU: its top_k and top_p, in place of vLLM's own."""


def vllm_version() -> str | None:
    """The version of vLLM that is installed, by whatever package; None if none is."""
    if importlib.util.find_spec("vllm") is None:
        return None
    packages = metadata.packages_distributions()["vllm"]
    return metadata.version(packages[0])


class VllmEngine:
    """An engine with a model loaded; `close` frees its memory.

    Args:
        spec: its model, window, shard size, and engine settings; the rest is of no account here.

    Raises:
        InputError: if vLLM is not installed.
    """

    def __init__(self, spec: GenerateSpec, artifacts: Artifacts) -> None:
        assert isinstance(spec.backend, Vllm)
        self.version = vllm_version()
        if self.version is None:
            remedy = "vLLM is not installed: install calprune[vllm], or take backend: transformers"
            raise InputError("backend", "vllm", remedy)
        config, self.generation_config = load_configs(spec.model, artifacts)
        self.rows = embedding_rows(config)
        self.on_cpu = not torch.cuda.is_available()
        for_cpu = {
            "kv_cache_memory_bytes": cpu_cache(spec.model, config, spec.shard_size, spec.seqlen),
            "logits_processors": ["pipeline.generation.vllm_sampling:TopKTopP"],
        }
        with process_settings(), weights(spec.model, artifacts) as (folder, options):
            with phase("importing vLLM"):
                vllm = importlib.import_module("vllm")
            with phase(STARTING):
                self.engine = vllm.LLM(
                    model=folder,
                    **options,
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # none: every request says all
                    dtype=model_dtype(spec.model),
                    max_model_len=spec.seqlen,
                    max_num_seqs=spec.shard_size,
                    **engine_arguments(spec.backend),
                    **(for_cpu if self.on_cpu else {}),
                )
        self.request = vllm.SamplingParams

    @property
    def facts(self) -> dict[str, Any]:
        """Engine, version and device."""
        device = device_name("cpu" if self.on_cpu else "cuda")
        return {"backend": "vllm", "backend_version": self.version, "device": device}

    def write(
        self,
        prefixes: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        ends: Sequence[int],
        known: Sequence[int],
        *,
        sampling: Sampling,
        seqlen: int,
        seed: int,
    ) -> list[list[int]]:
        """What comes after each prefix.

        Raises:
            EngineDiedError: if the engine is of no more use.
            NonFiniteError: if the model's logits are NaN or infinite.
        """
        drawn = [token for token in known if token < self.rows]
        kept: dict[str, Any] = {"top_k": sampling.top_k, "top_p": sampling.top_p}
        # Without a top_k all must be sorted, and without a top_p nothing.
        if self.on_cpu and sampling.top_k > 0 and sampling.top_p < 1:
            kept = {"extra_args": {TOP_K_TOP_P: [sampling.top_k, sampling.top_p]}}
        requests = [
            self.request(
                **kept,
                temperature=sampling.temperature,
                repetition_penalty=sampling.repetition_penalty,
                min_tokens=sampling.min_new_tokens,
                max_tokens=seqlen - len(prefix),
                stop_token_ids=list(ends),
                allowed_token_ids=drawn if len(drawn) < self.rows else None,
                logprobs=0,  # of the tokens that are drawn, which are NaN where a logit is
                ignore_eos=True,  # `ends` are all that count
                seed=request_seed(seed, sample),
                detokenize=False,
            )
            for prefix, sample in zip(prefixes, sample_ids, strict=True)
        ]
        prompts = [{"prompt_token_ids": list(prefix)} for prefix in prefixes]
        # What an earlier shard left in the cache must not decide how this one is computed.
        self.engine.reset_prefix_cache()
        total = sum(request.max_tokens for request in requests)
        try:
            with reported_steps(self.engine, lambda tokens, _: report(tokens, total, "tokens")):
                answers = self.engine.generate(prompts, requests, use_tqdm=False)
        except Exception as error:
            raise EngineDiedError(f"vLLM: {type(error).__name__}: {error}") from error
        texts = [answer.outputs[0] for answer in answers]
        for sample, text in zip(sample_ids, texts, strict=True):
            for step, (token, found) in enumerate(zip(text.token_ids, text.logprobs, strict=True)):
                if not math.isfinite(found[token].logprob):
                    raise NonFiniteError(
                        f"sample {sample}, new token {step + 1}: the model's logits are NaN or "
                        "infinite: check the weights and the dtype"
                    )
        return [list(text.token_ids) for text in texts]

    def close(self) -> None:
        """End the engine, and free what it held."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def reported_steps(engine: Any, tell: Callable[[int, int], None]) -> Iterator[None]:
    """Report after every step of an engine: its progress bar counts whole requests, and those of a
    shard all end at once.

    Args:
        tell: takes how many tokens, one a step for each unfinished request, and how many requests
            are done since the block began.
    """
    core = engine.llm_engine
    step = core.step
    tokens = finished = 0

    def reported_step() -> list[Any]:
        nonlocal tokens, finished
        tokens += core.get_num_unfinished_requests()
        outputs: list[Any] = step()
        finished += sum(output.finished for output in outputs)
        tell(tokens, finished)
        return outputs

    core.step = reported_step
    try:
        yield
    finally:
        del core.step  # the class has its own


def engine_arguments(backend: Vllm) -> dict[str, Any]:
    """What a spec's engine settings are for vLLM."""
    executor = "mp" if backend.gpus > 1 else "uni"
    return {"distributed_executor_backend": executor, **backend.model_dump(exclude={"name"})}


def cpu_cache(model: Model, config: Any, texts: int, longest: int) -> int:
    """Bytes of key-value cache that so many texts of the greatest length need."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype: torch.dtype = getattr(torch, model_dtype(model))
    layers: int = config.num_hidden_layers
    blocks = texts * math.ceil(longest / CPU_BLOCK_TOKENS)
    token_bytes = 2 * layers * int(heads * width) * dtype.itemsize
    return (blocks + 1) * CPU_BLOCK_TOKENS * token_bytes  # vLLM keeps one block for itself


@contextmanager
def process_settings() -> Iterator[None]:
    """What the engine must find in its process, and what it must leave as it was."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, see above
        VLLM_CACHE_ROOT=cache_folder(),  # replicas of one node spoil a cache that they share
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # else all replicas of a node bind to the same cores
        OMP_NUM_THREADS=str(torch.get_num_threads()),  # else it takes one thread
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # else it wins over what a shard needs
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts a function that does nothing there
        torch.set_num_threads(threads)


@contextmanager
def weights(model: Model, artifacts: Artifacts) -> Iterator[tuple[str, dict[str, Any]]]:
    """A checkpoint that vLLM loads: one made for it where the model is stored as masks."""
    if isinstance(model, PruneSpec) and model.stores_masks:
        with tempfile.TemporaryDirectory(prefix="calprune-vllm-") as folder:
            write_checkpoint(model, artifacts, Path(folder))
            yield folder, {"trust_remote_code": trusts_code(model)}
    else:
        folder, options = checkpoint_location(model, artifacts)
        check_checkpoint(model, artifacts)
        yield folder, options | ({} if allows_pickle(model) else {"load_format": "safetensors"})


@functools.cache
def cache_folder() -> str:
    """A folder of this process alone, which goes with it."""
    folder = tempfile.mkdtemp(prefix="calprune-vllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
