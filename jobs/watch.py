"""Who is told how a run goes: a person at a terminal, a job's log, and Ray's metrics."""

import logging
import sys
import threading
from collections.abc import Mapping
from types import TracebackType

import ray
from ray.util.metrics import Counter, Gauge
from rich.console import Console, Group
from rich.live import Live

from cluster.graph import Stage
from cluster.store import Failure, Manifest
from jobs.progress import Busy, Progress, line_name

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two looks at the cluster, and two settings of the metrics."""

SUMMARY_SECONDS = 30.0
"""Between two summaries in a log."""


class Watch:
    """Tells of a run from entry to exit: a line for every stage that ends, and all figures in a
    view at the foot of a terminal, or else now and then in the log."""

    def __init__(self, progress: Progress, grid: str) -> None:
        self.progress = progress
        self.metrics = Metrics(progress, grid)
        self.busy: Busy | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_now_and_then, daemon=True)
        self._live: Live | None = None
        if sys.stderr.isatty():
            view = self._view
            self._live = Live(get_renderable=view, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Watch":
        if self._live is not None:
            self._live.start()
            _log_to_stderr()  # which is above the view now
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

    def replicas(self, counts: Mapping[str, int]) -> None:
        """Take up how many actors there are for each kind of stage."""
        self.progress.replicas = counts

    def ended(self, stage: Stage, result: Manifest | Failure) -> None:
        """Report one stage."""
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
        """See what the cluster is doing, and set the metrics."""
        everything, free = ray.cluster_resources(), ray.available_resources()
        cpus, gpus = everything.get("CPU", 0.0), everything.get("GPU", 0.0)
        free_cpus, free_gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
        self.busy = Busy(cpus - free_cpus, cpus, gpus - free_gpus, gpus)
        self.metrics.set()

    def _look_now_and_then(self) -> None:
        told = self.progress.began
        while not self._over.wait(LOOK_SECONDS):
            self.look()
            now = self.progress.began + self.progress.seconds
            if self._live is None and now - told >= SUMMARY_SECONDS:
                told = now
                logger.info("%s", self.progress.summary(self.busy))

    def _view(self) -> Group:
        return self.progress.view(self.busy)


class Metrics:
    """The same figures as Ray's metrics, for its dashboard and Prometheus."""

    def __init__(self, progress: Progress, grid: str) -> None:
        self.progress = progress
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
        self.at_work = gauge("stages_in_flight", "Stages handed to Ray.", "stage")
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
        """Set what goes up and down."""
        for name, line in list(self.progress.lines.items()):
            self.at_work.set(line.at_work, {"stage": name})
            self.left.set(line.left, {"stage": name})
        for kind, count in self.progress.replicas.items():
            self.replicas.set(count, {"stage": kind})
        left = self.progress.seconds_left()
        if left is not None:
            self.seconds_left.set(left)


def _log_to_stderr() -> None:
    """Let the log's lines go to what is standard error now."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # and none of its kinds that write elsewhere
            handler.setStream(sys.stderr)
