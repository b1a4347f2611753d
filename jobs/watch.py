"""Report a run to a terminal, to a job's log, and to Ray's metrics."""

import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.util import find_spec
from types import TracebackType

import ray
from ray.util.metrics import Counter, Gauge
from rich.console import Console, Group
from rich.live import Live

from cluster.board import Board, Position
from cluster.graph import Stage
from cluster.store import Failure, Manifest
from cluster.watcher import Watcher
from jobs.forecast import Room
from jobs.progress import MOST_SHOWN, Busy, Progress, how_far, line_name

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two looks at the cluster, when the metrics are set too."""

LOOK_SHARE = 0.05
"""The most of a core that looks may take, beside the driver's own work: a forecast of 100,000
stages takes two seconds."""

SUMMARY_SECONDS = 30.0
"""Between two summaries in a log."""


class Watch(Watcher):
    """Reports a run from entry to exit, with a line for every stage that ends.

    A terminal, or a notebook with ipywidgets, shows all figures at its foot. A log gets them every
    `SUMMARY_SECONDS`, and a line for every stage that is still at work when the watch first sees
    it.
    """

    def __init__(
        self,
        progress: Progress,
        grid: str,
        board: Board | None = None,
        workers: int | None = None,
    ) -> None:
        """
        Args:
            board: where workers write their positions.
            workers: the most stages at one time.
        """
        super().__init__(board)
        self.progress = progress
        self.metrics = RunMetrics(progress, grid)
        self.workers = workers
        self.busy: Busy | None = None
        self._logged: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_repeatedly, daemon=True)
        self._live: Live | None = None
        console = Console(stderr=True)
        if sys.stderr.isatty() or _redraws(console):
            above = not console.is_jupyter  # which makes a block of each line that a view prints
            self._live = Live(
                get_renderable=self._view,
                console=console,
                transient=True,
                redirect_stdout=above,
                redirect_stderr=above,
            )

    def __enter__(self) -> "Watch":
        if self._live is not None:
            self._live.start()
            _log_to_stderr()  # its lines now appear above a terminal's view
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(LOOK_SECONDS)  # a lost cluster does not answer
        if self._live is not None:
            self._live.stop()
            _log_to_stderr()

    def started(self, stage: Stage) -> None:
        """Count a stage that is handed to Ray."""
        self.progress.start(stage)
        self._logged.discard(stage.key)

    def replicas(self, counts: Mapping[str, int]) -> None:
        """Record the number of actors of each kind of stage."""
        self.progress.replicas = counts

    def ended(self, stage: Stage, result: Manifest | Failure) -> None:
        """Report one stage that has ended."""
        progress = self.progress
        progress.end(stage, result)
        self.metrics.count(stage, result)
        place = f"[{progress.ended}/{progress.total}]"
        if isinstance(result, Failure):
            logger.error("%s %s failed: %s (%s)", place, stage.label, result.error, stage.key)
            return
        far = ""
        if line_name(stage) == "generate shard":
            rate = progress.tokens_a_second()
            far = f"; {progress.samples:,} samples, {rate:,.0f} tokens/s"
        at = f"at {progress.seconds:.0f} s{far}"
        logger.info("%s %s: %.1f s (%s)", place, stage.label, result.seconds, at)

    def look(self) -> None:
        """Read what the cluster is doing, and set the metrics."""
        everything, free = ray.cluster_resources(), ray.available_resources()
        cpus, gpus = everything.get("CPU", 0.0), everything.get("GPU", 0.0)
        free_cpus, free_gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
        self.busy = Busy(cpus - free_cpus, cpus, gpus - free_gpus, gpus)
        positions = {} if self.board is None else self.board.read()
        self.progress.look(positions, Room(cpus, gpus, self.workers))
        self.metrics.set()

    def _look_repeatedly(self) -> None:
        summarized = self.progress.began
        pause = LOOK_SECONDS
        while not self._over.wait(pause):
            started = time.thread_time()
            self.look()
            pause = max(LOOK_SECONDS, (time.thread_time() - started) / LOOK_SHARE)
            if self._live is None:
                self._log_started()
            now = self.progress.began + self.progress.seconds
            if self._live is None and now - summarized >= SUMMARY_SECONDS:
                summarized = now
                for line in self.progress.summary(self.busy):
                    logger.info("%s", line)

    def _log_started(self) -> None:
        """Log the stages that began since the last look and are still at work."""
        at_work = dict(self.progress.at_work)
        new = [key for key in at_work if key not in self._logged]
        self._logged.update(new)
        for key in new[:MOST_SHOWN]:
            stage = self.progress.in_flight.get(key)
            if stage is not None:
                logger.info("began: %s (%s)", stage.label, how_far(at_work[key]))
        if len(new) > MOST_SHOWN:
            logger.info("began: and %d more", len(new) - MOST_SHOWN)

    def _view(self) -> Group:
        return self.progress.view(self.busy)


def _redraws(console: Console) -> bool:
    """Return whether a notebook can draw again what is below a cell; rich does so by a widget."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


class RunMetrics:
    """The same figures as Ray's metrics, for its dashboard and Prometheus."""

    def __init__(self, progress: Progress, grid: str) -> None:
        self.progress = progress
        self._seen: dict[str, Position] = {}
        tags = {"grid": grid}

        def gauge(name: str, description: str, *keys: str) -> Gauge:
            made = Gauge(f"calprune_{name}", description, tag_keys=("grid", *keys))
            made.set_default_tags(tags)
            return made

        def counter(name: str, description: str, *keys: str) -> Counter:
            made = Counter(f"calprune_{name}", description, tag_keys=("grid", *keys))
            made.set_default_tags(tags)
            return made

        self.ended = counter("stages_ended", "Stages made or failed.", "stage", "outcome")
        self.seconds = counter("stage_seconds", "Seconds that made stages took.", "stage")
        self.samples = counter("samples_generated", "Samples generated.")
        self.tokens = counter("tokens_generated", "Tokens generated.")
        self.work = counter(
            "work", "Tokens, layers, windows, requests or steps done.", "stage", "unit"
        )
        self.in_flight = gauge("stages_in_flight", "Stages handed to Ray.", "stage")
        self.at_work = gauge("stages_at_work", "Stages on workers.", "stage")
        self.share = gauge(
            "share_done", "Mean share done of the present phase of stages at work.", "stage"
        )
        self.left = gauge("stages_left", "Stages that have not ended.", "stage")
        self.replicas = gauge("replicas", "Actors that make stages.", "stage")
        self.seconds_left = gauge("seconds_left", "Estimate of the time left.")

    def count(self, stage: Stage, result: Manifest | Failure) -> None:
        """Count one stage that has ended."""
        tags = {"stage": line_name(stage)}
        failed = isinstance(result, Failure)
        self.ended.inc(1, tags | {"outcome": "failed" if failed else "made"})
        if isinstance(result, Failure):
            return
        if result.seconds > 0:
            self.seconds.inc(result.seconds, tags)
        if line_name(stage) == "generate shard":
            for metric, made in (
                (self.samples, result.report["samples"]),
                (self.tokens, result.report["tokens_generated"]),
            ):
                if made:
                    metric.inc(made)

    def set(self) -> None:
        """Set the gauges, and count the work since the last look."""
        for name, line in list(self.progress.lines.items()):
            self.in_flight.set(line.in_flight, {"stage": name})
            self.at_work.set(line.at_work, {"stage": name})
            self.left.set(line.left, {"stage": name})
        for kind, count in self.progress.replicas.items():
            self.replicas.set(count, {"stage": kind})
        left = self.progress.seconds_left()
        if left is not None:
            self.seconds_left.set(left)
        self._set_work()

    def _set_work(self) -> None:
        """Count what has been done since the last look."""
        shares: defaultdict[str, list[float]] = defaultdict(list)
        before, self._seen = self._seen, dict(self.progress.at_work)
        for key, position in self._seen.items():
            stage = self.progress.in_flight.get(key)
            if stage is None or not position.unit:
                continue
            last = before.get(key)
            same = last is not None and (last.phase, last.unit) == (position.phase, position.unit)
            done = position.done - (last.done if last is not None and same else 0.0)
            if done > 0:
                self.work.inc(done, {"stage": line_name(stage), "unit": position.unit})
            shares[line_name(stage)].append(position.share)
        for name in self.progress.lines:
            each = shares[name]
            self.share.set(sum(each) / len(each) if each else 0.0, {"stage": name})


def _log_to_stderr() -> None:
    """Send the log's lines to the present standard error."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # its subclasses write elsewhere
            handler.setStream(sys.stderr)
