from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.generation.sampling import Sampling
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.generation.vllm_engine import reported_steps
from pipeline.progress import TokenStream, counted, phase, report, reporting
from pipeline.pruning.walk import walk
from pipeline.pruning.window_groups import Memory
from pipeline.scoring.score import score_samples


def test_a_stage_reports_its_phase_and_position() -> None:
    heard: list[tuple[str, float, float, str]] = []
    with reporting(lambda *call: heard.append(call)):
        with phase("loading the model"):
            report(1, 2, "files")
        report(3, 30, "layers")
    assert heard == [
        ("loading the model", 0.0, 0.0, ""),
        ("loading the model", 1, 2, "files"),
        ("", 0.0, 0.0, ""),
        ("", 3, 30, "layers"),
    ]


def test_reports_outside_the_block_reach_nobody() -> None:
    heard: list[object] = []
    with reporting(lambda *call: heard.append(call)):
        pass
    with phase("outside"):
        report(1, 2, "layers")
    with reporting(lambda *call: heard.append(call)):
        report(1, 2, "layers")
    assert heard == [("", 1, 2, "layers")]


def test_items_are_counted_once_they_are_done() -> None:
    heard: list[tuple[float, float, str]] = []
    with reporting(lambda phase, *call: heard.append(call)):
        items = counted("ab", 2, "windows")
        assert next(items) == "a"
        assert heard == [(0, 2, "windows")]
        assert list(items) == ["b"]
    assert heard == [(0, 2, "windows"), (1, 2, "windows"), (2, 2, "windows")]


def test_the_tokens_of_a_batch_are_counted_without_the_prompt() -> None:
    heard: list[tuple[float, float]] = []
    stream = TokenStream(total=6)
    with reporting(lambda phase, done, total, unit: heard.append((done, total))):
        stream.put(torch.zeros(3, 5))
        stream.put(torch.zeros(3))
        stream.put(torch.zeros(3))
        stream.end()
    assert heard == [(3, 6), (6, 6)]


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


Report = tuple[str, float, float, str]


def heard_of(work: Callable[[], object]) -> list[Report]:
    heard: list[Report] = []
    with reporting(lambda *call: heard.append(call)):
        work()
    return heard


def check_counts(heard: list[Report], unit: str, total: float) -> None:
    """Check that the counts rise and stay within the total."""
    counts = [done for _, done, _, its_unit in heard if its_unit == unit]
    assert len(counts) > 2
    assert counts == sorted(counts)
    assert {call[2] for call in heard if call[3] == unit} == {total}
    assert counts[-1] <= total


def test_generation_reports_the_tokens_of_every_step() -> None:
    engine = TransformersEngine(tiny_model())
    sampling = Sampling(top_k=5, top_p=1.0, temperature=1.0, repetition_penalty=1.0)
    heard = heard_of(
        lambda: engine.write(
            [[1], [2, 3], [4]], [0, 1, 2], [], range(64), sampling=sampling, seqlen=11, seed=0
        )
    )
    check_counts(heard, "tokens", 10 + 9 + 10)
    assert [each[1] for each in heard] == [*range(2, 21, 2), *range(21, 30)]


def test_a_walk_reports_layers_and_parts_of_them() -> None:
    windows = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
    heard = heard_of(
        lambda: walk(
            tiny_model(),
            windows,
            ("squared_norms",),
            lambda number, found: None,
            Memory(batch_size=2),
        )
    )
    check_counts(heard, "layers", 3)
    assert {0, 1, 2} < {call[1] for call in heard}
    assert max(call[1] for call in heard) > 2


def test_scoring_reports_the_tokens_of_every_batch() -> None:
    texts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    heard = heard_of(lambda: score_samples(tiny_model(), texts, [1, 1, 1], batch_tokens=3))
    check_counts(heard, "tokens", 9)
    assert heard[-1][1] == 9


def test_a_vllm_engine_reports_a_token_a_step_for_each_unfinished_text() -> None:
    left = [3, 3, 2, 0]

    class Core:
        def get_num_unfinished_requests(self) -> int:
            return left[0]

        def step(self) -> list[SimpleNamespace]:
            ended = left.pop(0) - left[0]
            return [SimpleNamespace(finished=True)] * ended

    engine = SimpleNamespace(llm_engine=Core())
    calls: list[tuple[int, int]] = []
    with reported_steps(engine, lambda tokens, finished: calls.append((tokens, finished))):
        while left[0]:
            engine.llm_engine.step()
    assert calls == [(3, 0), (6, 1), (8, 3)]
    assert "step" not in vars(engine.llm_engine)
