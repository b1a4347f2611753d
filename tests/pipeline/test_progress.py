import torch

from pipeline.progress import TokenStream, counted, phase, report, reporting


def test_a_stage_reports_its_phase_and_how_far_it_is() -> None:
    heard: list[tuple[str, float, float, str]] = []
    with reporting(lambda *told: heard.append(told)):
        phase("loading the model")
        phase("")
        report(3, 30, "layers")
    assert heard == [
        ("loading the model", 0.0, 0.0, ""),
        ("", 0.0, 0.0, ""),
        ("", 3, 30, "layers"),
    ]


def test_nobody_hears_what_is_reported_outside() -> None:
    heard: list[object] = []
    with reporting(lambda *told: heard.append(told)):
        phase("inside")
    phase("outside")
    report(1, 2, "layers")
    with reporting(lambda *told: heard.append(told)):
        report(1, 2, "layers")
    assert heard == [("inside", 0.0, 0.0, ""), ("", 1, 2, "layers")]


def test_items_are_counted_once_they_are_done() -> None:
    heard: list[tuple[float, float, str]] = []
    with reporting(lambda phase, *told: heard.append(told)):
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
