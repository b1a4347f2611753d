"""Timing of several runs that take turns, so that what else runs hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 2
"""Runs of each contender at the least."""


def best_of(
    contenders: Mapping[str, Callable[[], Callable[[], object]]],
    budget_seconds: float,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of each contender's fastest run.

    Args:
        contenders: each prepares a run, untimed, and returns it. The first run of each does not
            count.
        budget_seconds: rounds go on until they have taken as long, `ROUNDS` at the least.
    """
    seconds = dict.fromkeys(contenders, float("inf"))
    for prepare in contenders.values():
        _timed(prepare(), device)
    start, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - start < budget_seconds:
        for name, prepare in contenders.items():
            seconds[name] = min(seconds[name], _timed(prepare(), device))
        rounds += 1
    return seconds


def clock(device: torch.device) -> float:
    """Seconds when all that was asked of the device is done.

    On a CPU the CPU time of this process: meant for one thread, and less disturbed by other work
    on the machine than wall time is, which it is on any other device.
    """
    _finish(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def median_seconds(
    contenders: Mapping[str, Callable[[], Callable[[], object]]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median over each contender's runs, by `clock`.

    Args:
        contenders: each prepares a run, untimed, and returns it.
        rounds: how often each of them runs, in turns.
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
