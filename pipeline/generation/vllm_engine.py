"""Generation by vLLM: the samples of a shard are requests that are handed over together.

The engine runs inside this process. So it has all requests of a shard before its first step, and
the same ones share a batch every time. And an engine that crashes takes the process with it, which
is noticed and replaced; a process that waits for a dead engine would not be.
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
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.environment import scratch_folder
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
from pipeline.models.loading import load_configs
from pipeline.models.vocabulary import embedding_rows
from pipeline.progress import phase, report
from pipeline.specs import GenerateSpec, Model, PruneSpec, Vllm
from pipeline.stage import Artifacts

CPU_BLOCK_TOKENS = 128
"""Tokens of a block of the key-value cache on a CPU: a sample takes whole blocks."""

STARTING = "starting vLLM: it loads the model and compiles"
"""The phase of an engine's start, which takes minutes on some machines."""

TOP_K_TOP_P = "calprune_top_k_top_p"
"""In the `extra_args` of a request on a CPU: its top_k and top_p, in place of vLLM's own."""


@functools.cache  # it reads the lists of all packages' files
def vllm_version() -> str | None:
    """Return the version of the installed package that provides vLLM; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    packages = metadata.packages_distributions()["vllm"]
    return metadata.version(packages[0])


class VllmEngine:
    """An engine with a model loaded; `close` frees its memory.

    Args:
        spec: only its model, seqlen, shard size and engine settings are used.

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
            "kv_cache_memory_bytes": cpu_cache_bytes(
                spec.model, config, spec.shard_size, spec.seqlen
            ),
            "logits_processors": ["pipeline.generation.vllm_sampling:TopKTopP"],
        }
        with process_settings(), vllm_checkpoint(spec.model, artifacts) as (folder, options):
            with phase("importing vLLM"):
                vllm = importlib.import_module("vllm")
            with phase(STARTING):
                self.engine = vllm.LLM(
                    model=folder,
                    **options,
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # none: every request has all settings
                    dtype=spec.model.dtype,
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
        """Return what follows each prefix.

        Raises:
            EngineDiedError: if the engine broke down.
            NonFiniteError: if the model's logits are NaN or infinite.
        """
        drawn = [token for token in known if token < self.rows]
        limits: dict[str, Any] = {"top_k": sampling.top_k, "top_p": sampling.top_p}
        # Without a top_k the whole vocabulary must be sorted, and without a top_p nothing.
        if self.on_cpu and sampling.top_k > 0 and sampling.top_p < 1:
            limits = {"extra_args": {TOP_K_TOP_P: [sampling.top_k, sampling.top_p]}}
        requests = [
            self.request(
                **limits,
                temperature=sampling.temperature,
                repetition_penalty=sampling.repetition_penalty,
                min_tokens=sampling.min_new_tokens,
                max_tokens=seqlen - len(prefix),
                stop_token_ids=list(ends),
                allowed_token_ids=drawn if len(drawn) < self.rows else None,
                logprobs=0,  # of the drawn tokens; NaN where a logit is
                ignore_eos=True,  # only `ends` end a text
                seed=request_seed(seed, sample),
                detokenize=False,
            )
            for prefix, sample in zip(prefixes, sample_ids, strict=True)
        ]
        prompts = [{"prompt_token_ids": list(prefix)} for prefix in prefixes]
        # What an earlier shard left in the cache must not change how this one is computed.
        self.engine.reset_prefix_cache()
        total = sum(request.max_tokens for request in requests)
        try:
            with reported_steps(self.engine, lambda tokens, _: report(tokens, total, "tokens")):
                outputs = self.engine.generate(prompts, requests, use_tqdm=False)
        except Exception as error:
            raise EngineDiedError(f"vLLM: {type(error).__name__}: {error}") from error
        texts = [output.outputs[0] for output in outputs]
        for sample, text in zip(sample_ids, texts, strict=True):
            for step, (token, found) in enumerate(zip(text.token_ids, text.logprobs, strict=True)):
                if not math.isfinite(found[token].logprob):
                    raise NonFiniteError(
                        f"sample {sample}, new token {step + 1}: the model's logits are NaN or "
                        "infinite: check the weights and the dtype"
                    )
        return [list(text.token_ids) for text in texts]

    def close(self) -> None:
        """End the engine and free its memory."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def reported_steps(engine: Any, on_step: Callable[[int, int], None]) -> Iterator[None]:
    """Report after every step of an engine within the block.

    The engine's own progress bar counts whole requests, and those of a shard all end at once.

    Args:
        on_step: takes the tokens since the block began, one a step for each unfinished request,
            and the finished requests.
    """
    core = engine.llm_engine
    step = core.step
    tokens = finished = 0

    def reported_step() -> list[Any]:
        nonlocal tokens, finished
        tokens += core.get_num_unfinished_requests()
        outputs: list[Any] = step()
        finished += sum(output.finished for output in outputs)
        on_step(tokens, finished)
        return outputs

    core.step = reported_step
    try:
        yield
    finally:
        del core.step  # the class has its own


def engine_arguments(backend: Vllm) -> dict[str, Any]:
    """Return a spec's engine settings as vLLM's arguments."""
    executor = "mp" if backend.gpus > 1 else "uni"
    return {"distributed_executor_backend": executor, **backend.model_dump(exclude={"name"})}


def cpu_cache_bytes(model: Model, config: Any, texts: int, longest: int) -> int:
    """Return the bytes of key-value cache that `texts` texts of `longest` tokens need."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype: torch.dtype = getattr(torch, model.dtype)
    layers: int = config.num_hidden_layers
    blocks = texts * math.ceil(longest / CPU_BLOCK_TOKENS)
    token_bytes = 2 * layers * int(heads * width) * dtype.itemsize
    return (blocks + 1) * CPU_BLOCK_TOKENS * token_bytes  # vLLM keeps one block for itself


@contextmanager
def process_settings() -> Iterator[None]:
    """Set what the engine reads from its process, and restore what it would change."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, see above
        VLLM_CACHE_ROOT=cache_folder(),  # replicas of one node spoil a cache that they share
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # else all replicas of a node bind to the same cores
        OMP_NUM_THREADS=str(torch.get_num_threads()),  # else it takes one thread
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # else it overrides what a shard needs
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM replaces it by a function that does nothing
        torch.set_num_threads(threads)


@contextmanager
def vllm_checkpoint(model: Model, artifacts: Artifacts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a checkpoint that vLLM loads and its options; a model of masks is written as one."""
    if isinstance(model, PruneSpec) and model.stores_masks:
        with tempfile.TemporaryDirectory(prefix="calprune-vllm-", dir=scratch_folder()) as folder:
            write_checkpoint(model, artifacts, Path(folder))
            yield folder, {"trust_remote_code": trusts_code(model)}
    else:
        folder, options = checkpoint_location(model, artifacts)
        check_checkpoint(model, artifacts)
        yield folder, options | ({} if allows_pickle(model) else {"load_format": "safetensors"})


@functools.cache
def cache_folder() -> str:
    """Return a folder of this process alone, which is deleted when it ends.

    Only the descriptions of vLLM's model classes are shared, by a link to vLLM's own cache: they go
    by a hash of the code and are written in one step. Each costs a process that imports vLLM.
    """
    folder = tempfile.mkdtemp(prefix="calprune-vllm-", dir=scratch_folder())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shared = Path.home() / ".cache/vllm/modelinfos"
    with suppress(OSError):  # without a home that can be written, each process has its own
        shared.mkdir(parents=True, exist_ok=True)
        Path(folder, shared.name).symlink_to(shared)
    return folder
