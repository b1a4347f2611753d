"""Time several runs in turns, so that other work on the machine disturbs all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

LEAST_ROUNDS = 2
"""The fewest timed runs of each contender."""


def best_of(
    contenders: Mapping[str, Callable[[], Callable[[], object]]],
    budget_seconds: float,
    device: torch.device,
) -> dict[str, float]:
    """Return the seconds of each contender's fastest run.

    Args:
        contenders: each prepares a run, untimed, and returns it. The first run of each does not
            count.
        budget_seconds: rounds go on for so long, but at least `LEAST_ROUNDS` are run.
    """
    seconds = dict.fromkeys(contenders, float("inf"))
    for prepare in contenders.values():
        _timed(prepare(), device)
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < budget_seconds:
        for name, prepare in contenders.items():
            seconds[name] = min(seconds[name], _timed(prepare(), device))
        rounds += 1
    return seconds


def clock(device: torch.device) -> float:
    """Wait until the device is idle, and return the seconds on its clock.

    On a CPU that is the CPU time of this process, which other work disturbs less than wall time; it
    is meant for one thread. On other devices it is wall time.
    """
    _finish(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def median_seconds(
    contenders: Mapping[str, Callable[[], Callable[[], object]]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of each contender's runs, by `clock`.

    Args:
        contenders: each prepares a run, untimed, and returns it.
        rounds: how often each runs, in turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, prepare in contenders.items():
            run = prepare()
            start = clock(device)
            run()
            seconds[name].append(clock(device) - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
