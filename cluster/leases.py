"""Which run makes which stage: runs share a store, and none makes what another is making.

A run says in `runs/<run>.json` where it runs and in `uses/<run>.json` which artifacts it uses, and
puts a new number into `pulses/<run>.json` every ten seconds. While one of its workers makes a
stage, that run's name stands in `leases/<key>.json`. A lease lives as long as its run.

No machine's clock is compared with another's. A run is dead where an observer has seen one and the
same pulse for a minute of its own monotonic clock, where it is a process of the observer's machine
that is gone, or where it has no record. A wrong verdict costs work and no result: two writers of
one key end with one whole artifact.
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
"""How long a pulse may stand still: several pulses, since object stores are slow at times."""

SETTLE_SECONDS = 1.0
"""How long one waits, after taking over a dead run's lease, for another who does the same."""


class RunRecord(BaseModel):
    """What a run tells others of itself."""

    model_config = ConfigDict(frozen=True)

    run: str
    host: str
    machine: str | None
    """A boot of a machine and a namespace of its processes; None where there is no telling."""
    process: int
    started: str | None
    """When the process was started, as the machine counts it."""


class Claim:
    """A run's record and pulse, from entry to exit.

    Args:
        keys: all artifacts that it makes or reads.
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
            started=_started(process),
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
        with contextlib.suppress(Exception):  # a record without a pulse is soon a dead one
            forget(self.store, self.run)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(PULSE_SECONDS):
            count += 1
            try:
                self._pulse(count)
            except Exception as error:  # the next one may come through
                logger.warning("no pulse: %s", error)

    def _pulse(self, count: int) -> None:
        if self.store.read(f"runs/{self.run}.json") is None:  # never there, or declared dead
            self.store.write(f"uses/{self.run}.json", self._keys)
            self.store.write(f"runs/{self.run}.json", self._record.model_dump_json().encode())
        self.store.write(f"pulses/{self.run}.json", str(count).encode())


class Observer:
    """Tells which runs are alive, from what it has seen of their pulses."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: dict[str, tuple[bytes | None, float]] = {}

    def alive(self, run: str) -> bool:
        """Whether a run may still be at work; a run seen for the first time is, unless known dead.

        What is found dead is forgotten, so that nobody need watch it again.
        """
        text = self.store.read(f"runs/{run}.json")
        if text is None:
            return False
        pulse = self.store.read(f"pulses/{run}.json")
        now = time.monotonic()
        if run not in self._seen or self._seen[run][0] != pulse:
            self._seen[run] = pulse, now
        if now - self._seen[run][1] < LEASE_SECONDS and not _gone(text):
            return True
        logger.info("run %s is dead", run)
        forget(self.store, run)
        return False

    def used(self) -> set[str]:
        """The artifacts of the runs that are alive, once it is known which are.

        Waits for a pulse of each, which takes up to a minute if one is dead.
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
    """Remove a run's record, by which its leases become void."""
    for folder in ("pulses", "runs", "uses"):
        store.remove(f"{folder}/{run}.json")


def take(store: Store, key: str, run: str, dead: Collection[str]) -> str | None:
    """Take the lease of a stage.

    Args:
        dead: runs whose leases may be taken over.

    Returns:
        None if this run has the lease now, else the run that has it.
    """
    name = f"leases/{key}.json"
    while not store.create(name, run.encode()):
        holder = holding(store, key)
        if holder is None:  # given back meanwhile
            continue
        if holder == run:  # of an attempt of this run that was lost
            return None
        if holder not in dead:
            return holder
        store.write(name, run.encode())
        time.sleep(SETTLE_SECONDS)
        holder = holding(store, key)
        return None if holder == run else holder
    return None


def holding(store: Store, key: str) -> str | None:
    """The run that holds the lease of a stage, or None."""
    content = store.read(f"leases/{key}.json")
    return None if content is None else content.decode()


def give_back(store: Store, key: str, run: str) -> None:
    """Remove the lease of a stage, if it is this run's."""
    if holding(store, key) == run:
        store.remove(f"leases/{key}.json")


def sweep(store: Store, observer: Observer) -> None:
    """Remove the leases of runs that are known to be dead."""
    leases = store.names("leases")
    if not leases:
        return
    alive = {run for run in store.names("runs") if observer.alive(run)}
    for key in leases:
        if holding(store, key) not in alive:
            store.remove(f"leases/{key}.json")


def _gone(record: bytes) -> bool:
    """Whether a run was a process of this machine that is no more."""
    try:
        told = RunRecord.model_validate_json(record)
    except ValidationError:  # of another version: its pulse tells
        return False
    here = told.machine is not None and told.machine == _machine()
    return here and _started(told.process) != told.started


@functools.cache
def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not a Linux system
        return None


def _started(process: int) -> str | None:
    """When a process was started, in ticks since the boot: a number that no clock moves."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    fields = status.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]
