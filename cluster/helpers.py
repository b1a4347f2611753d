"""Further actors that share the work of one stage with the process that makes it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayTaskError
from ray.util import (
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.board import write_nothing
from cluster.graph import Resources, Stage
from cluster.schedule import bundle
from cluster.scratch import own_scratch
from cluster.store import Store


class Help(Protocol):
    """Makes a helper's part in a stage: an object whose methods the stage calls.

    Of `members` processes it is number `member`, from 1: the first one makes the stage.
    """

    def __call__(
        self,
        payload: str,
        artifacts: Mapping[str, Path],
        cpus: int,
        member: int,
        members: int,
    ) -> Any: ...


class Helpers:
    """Actors that each hold a part in one stage.

    Calls of one helper run one after another. Values go straight from one to the other: a promise
    can be an argument of a call.
    """

    def __init__(self, actors: Sequence[Any] = (), starting: Sequence[Any] = ()) -> None:
        """
        Args:
            starting: promises that the actors are ready; the first call waits for them, since the
                stage has work of its own before.
        """
        self._actors = actors
        self._starting = list(starting)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._actors)

    def call(self, helper: int, method: str, *arguments: Any, returns: int = 1) -> Any:
        """Start a method of a helper's part.

        Args:
            arguments: values, which are copied at once, or promises.
            returns: how many values the method returns, as a tuple if there are several.

        Returns:
            A promise of the value; a list of promises if there are several.
        """
        while self._starting:
            self.value(self._starting.pop())
        called = self._actors[helper].call.options(num_returns=returns)
        return called.remote(method, *arguments)

    def value(self, promise: Any) -> Any:
        """Wait for a call and return its value.

        Raises:
            Exception: what the call has raised.
            RayError: if the helper's process or node was lost.
        """
        try:
            return ray.get(promise)
        except RayTaskError as error:
            raise error.cause from error


NO_HELPERS = Helpers()


class _Helper:
    """An actor with a part in one stage."""

    def __init__(self) -> None:
        self._part: Any = None
        self._within = ExitStack()

    def start(
        self, stage: Stage, help: Help, store: str, prepared: Any, member: int, members: int
    ) -> None:
        """Read the stage's inputs, and make the part."""
        own_scratch()
        # The position of the first process is shown.
        self._within.enter_context(prepared(stage.kind, write_nothing))
        opened = Store(store)
        artifacts = {key: opened.fetch(key) for key in stage.inputs}
        self._part = help(stage.payload, artifacts, stage.resources.cpus, member, members)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the part."""
        return getattr(self._part, method)(*arguments)


_remote_helper = ray.remote(_Helper)


def ray_options(resources: Resources) -> dict[str, Any]:
    """Return resources as Ray's options for tasks and actors."""
    asked = bundle(resources)
    options = {"num_cpus": asked["CPU"], "num_gpus": asked.get("GPU", 0.0)}
    return options | ({"memory": asked["memory"]} if "memory" in asked else {})


class Room:
    """What Ray reserves for an actor and its helpers: for all of them, or for none.

    Without helpers nothing is reserved.
    """

    def __init__(self, resources: Resources) -> None:
        self.options = ray_options(resources)
        self._group: Any = None
        if resources.actors > 1:
            bundles = [dict(bundle(resources)) for _ in range(resources.actors)]
            self._group = placement_group(bundles, strategy="PACK")
            self.options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, 0)

    def release(self) -> None:
        """Give it back; whatever still runs in it ends."""
        if self._group is not None:
            remove_placement_group(self._group)


@contextlib.contextmanager
def helpers_of(stage: Stage, help: Help | None, store: str, prepared: Any) -> Iterator[Helpers]:
    """Start the helpers that a stage asks for, where room is reserved for them (`Room`).

    Args:
        help: may be None if no stage of the run has helpers.
        store: URL.
        prepared: the context in which they work, as `cluster.worker.Prepared`.
    """
    members = stage.resources.actors
    if members == 1:
        yield NO_HELPERS
        return
    assert help is not None, "a stage with helpers needs Aids.help"
    group = get_current_placement_group()
    actors = [
        _remote_helper.options(
            **ray_options(stage.resources),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, member),
        ).remote()
        for member in range(1, members)
    ]
    try:
        starting = [
            actor.start.remote(stage, help, store, prepared, member, members)
            for member, actor in enumerate(actors, start=1)
        ]
        yield Helpers(actors, starting)
    finally:
        for actor in actors:
            ray.kill(actor)
