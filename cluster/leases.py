"""Leases: of several runs that share a store, one at a time makes a stage.

A run writes in `runs/<run>.json` where it runs and in `uses/<run>.json` which artifacts it uses,
and every ten seconds writes a new number into `pulses/<run>.json`. While one of its workers makes a
stage, `leases/<key>.json` holds the run's name. A lease lasts as long as its run.

Clocks of different machines are never compared. A run is dead if an observer has seen the same
pulse for a minute of its own monotonic clock, if it was a process of the observer's machine that
has ended, or if it has no record. A wrong verdict costs work but no result: two writers of one key
leave one whole artifact.
"""

import contextlib
import functools
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.store import Store

logger = logging.getLogger(__name__)

PULSE_SECONDS = 10.0
LEASE_SECONDS = 60.0
"""How long a pulse may stand still: several pulses, since object stores are sometimes slow."""

SETTLE_SECONDS = 1.0
"""How long a run that takes over a dead run's lease waits for another that does the same."""


class RunRecord(BaseModel):
    """Where a run runs, for other runs."""

    model_config = ConfigDict(frozen=True)

    run: str
    host: str
    machine: str | None
    """The machine's boot and its process namespace; None if unknown."""
    process: int
    started: str | None
    """When the process started, in the machine's own count."""


class Claim:
    """A run's record and pulse, from entry to exit.

    Args:
        keys: all artifacts that the run makes or reads.
    """

    def __init__(self, store: Store, keys: Collection[str]) -> None:
        self.store = store
        self.run = uuid.uuid4().hex
        process = os.getpid()
        self._record = RunRecord(
            run=self.run,
            host=platform.node(),
            machine=_machine(),
            process=process,
            started=_start_of(process),
        )
        self._keys = json.dumps(sorted(keys)).encode()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> "Claim":
        self._pulse(0)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # without a pulse the record soon counts as dead
            forget(self.store, self.run)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(PULSE_SECONDS):
            count += 1
            try:
                self._pulse(count)
            except Exception as error:  # the next pulse may succeed
                logger.warning("no pulse: %s", error)

    def _pulse(self, count: int) -> None:
        if self.store.read(f"runs/{self.run}.json") is None:  # not yet written, or declared dead
            self.store.write(f"uses/{self.run}.json", self._keys)
            self.store.write(f"runs/{self.run}.json", self._record.model_dump_json().encode())
        self.store.write(f"pulses/{self.run}.json", str(count).encode())


class Observer:
    """Judges which runs are alive by the pulses that it has seen."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: dict[str, tuple[bytes | None, float]] = {}

    def alive(self, run: str) -> bool:
        """Return whether a run may still be at work.

        A run seen for the first time is alive unless known to be dead. The record of a dead run is
        removed, so that no other observer need watch it.
        """
        text = self.store.read(f"runs/{run}.json")
        if text is None:
            return False
        pulse = self.store.read(f"pulses/{run}.json")
        now = time.monotonic()
        if run not in self._seen or self._seen[run][0] != pulse:
            self._seen[run] = pulse, now
        if now - self._seen[run][1] < LEASE_SECONDS and not _has_ended(text):
            return True
        logger.info("run %s is dead", run)
        forget(self.store, run)
        return False

    def used(self) -> set[str]:
        """Return the keys of the artifacts that living runs use.

        Waits for a pulse of each run, which takes up to a minute if one is dead.
        """
        unsure = self.store.names("runs")
        first = {run: self.store.read(f"pulses/{run}.json") for run in unsure}
        while unsure := {run for run in unsure if self.alive(run)}:
            if all(self._seen[run][0] != first[run] for run in unsure):
                break
            time.sleep(SETTLE_SECONDS)
        texts = [self.store.read(f"uses/{run}.json") or b"[]" for run in unsure]
        return {key for text in texts for key in json.loads(text)}


def forget(store: Store, run: str) -> None:
    """Remove a run's record, which voids its leases."""
    for folder in ("pulses", "runs", "uses"):
        store.remove(f"{folder}/{run}.json")


def acquire(store: Store, key: str, run: str, dead: Collection[str]) -> str | None:
    """Acquire the lease of a stage.

    Args:
        dead: runs whose leases may be taken over.

    Returns:
        None if this run has the lease now, else the run that has it.
    """
    name = f"leases/{key}.json"
    while not store.create(name, run.encode()):
        other = holder(store, key)
        if other is None:  # released meanwhile
            continue
        if other == run:  # left by a lost attempt of this run
            return None
        if other not in dead:
            return other
        store.write(name, run.encode())
        time.sleep(SETTLE_SECONDS)
        other = holder(store, key)
        return None if other == run else other
    return None


def holder(store: Store, key: str) -> str | None:
    """Return the run that holds the lease of a stage, or None."""
    content = store.read(f"leases/{key}.json")
    return None if content is None else content.decode()


def release(store: Store, key: str, run: str) -> None:
    """Remove the lease of a stage if this run holds it."""
    if holder(store, key) == run:
        store.remove(f"leases/{key}.json")


def sweep(store: Store, observer: Observer) -> None:
    """Remove the leases of runs that are known to be dead."""
    leases = store.names("leases")
    if not leases:
        return
    alive = {run for run in store.names("runs") if observer.alive(run)}
    for key in leases:
        if holder(store, key) not in alive:
            store.remove(f"leases/{key}.json")


def _has_ended(record: bytes) -> bool:
    """Return whether a run was a process of this machine that has ended."""
    try:
        run = RunRecord.model_validate_json(record)
    except ValidationError:  # half written, or of another version: judge by its pulse
        return False
    here = run.machine is not None and run.machine == _machine()
    return here and _start_of(run.process) != run.started


@functools.cache
def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not a Linux system
        return None


def _start_of(process: int) -> str | None:
    """Return when a process started, in ticks since the boot, which no clock changes; None if it
    does not run."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    fields = status.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]
