"""A page that shows how far a grid is, from its store alone: `calprune page`."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster.store import Manifest, Store
from jobs.gather import gather
from jobs.plan import Plan
from jobs.show import STATES, count_states, states_of

PAGE = Path(__file__).with_name("live_page.html")

REFRESH_SECONDS = 5.0
"""Between two looks at the store, however many browsers ask."""

RECENT_SECONDS = 600.0
"""The time whose rate the projected end goes by."""

MOST_SHOWN = 50
"""The most failures, and stages at work, that a page lists."""


class Page:
    """What a grid's page shows. Artifacts never change, so each is read once."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.store = store
        self._made: dict[str, Manifest] = {}
        self._results: dict[str, list[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {}
        self._looked = -float("inf")

    def state(self) -> dict[str, Any]:
        """Return the figures of the last look, which is at most `REFRESH_SECONDS` old."""
        with self._lock:
            if time.monotonic() - self._looked >= REFRESH_SECONDS:
                self._state = self._look(time.time())
                self._looked = time.monotonic()
            return self._state

    def _look(self, now: float) -> dict[str, Any]:
        plan, store = self.plan, self.store
        states = states_of(plan, store)
        done, under_way, failed = (
            [key for key, state in states.items() if state == name] for name in STATES[:3]
        )
        for key in done:
            if key not in self._made and (manifest := store.manifest(key)) is not None:
                self._made[key] = manifest
        failures = []
        for key in failed[:MOST_SHOWN]:
            found = store.failure(key)
            if found is not None:
                failures.append({"label": plan.graph[key].label, "error": found.error, "key": key})
        columns, rows = self._table(set(done))
        return {
            "grid": plan.grid.name,
            "note": plan.grid.note,
            "store": store.url,
            "states": STATES,
            "stages": count_states(plan, states),
            "at_work": [plan.graph[key].label for key in under_way[:MOST_SHOWN]],
            "failures": failures,
            "recent": self._recent(now),
            "seconds_left": seconds_left(plan, self._made, now),
            "columns": columns,
            "results": rows,
        }

    def _recent(self, now: float) -> int:
        """Return how many stages ended in the last `RECENT_SECONDS`."""
        return sum(now - made.finished <= RECENT_SECONDS for made in self._made.values())

    def _table(self, done: set[str]) -> tuple[list[str], list[list[Any]]]:
        """Return the results so far: headings, and a row for each cell."""
        cells = self.plan.cells
        dense = {key: cell for key, cell in cells.items() if cell.pruner is None}
        new = {key: cell for key, cell in cells.items() if key in done and key not in self._results}
        if new:
            part = dataclasses.replace(self.plan, cells={**dense, **new})
            self._results |= {key: [] for key in new}
            for row in gather(part, self.store).to_pylist():
                if row["evaluate_key"] in new:
                    self._results[row["evaluate_key"]].append(row)
        known = {key: self._results[key] for key in cells if key in self._results}
        metrics = dict.fromkeys(
            (row["task"], row["metric"]) for rows in known.values() for row in rows if row["metric"]
        )
        table = []
        for key, rows in known.items():
            values = {(row["task"], row["metric"]): row["value"] for row in rows}
            lost = None if rows[0]["status"] == "ok" else rows[0]["status"]
            label = self.plan.graph[key].label.removeprefix("evaluate ")
            table.append([label, *(values.get(metric, lost) for metric in metrics)])
        return ["cell", *(" ".join(metric) for metric in metrics)], table


def seconds_left(plan: Plan, made: dict[str, Manifest], now: float) -> float | None:
    """Return the seconds until all stages are made, at the rate of the last `RECENT_SECONDS`; None
    if none ended in them.

    What is left takes the expected seconds of its stages, scaled by what those that are made took.
    The rate is the seconds of the stages that ended, for each second that passed.
    """
    expected = sum(plan.graph[key].seconds for key in made)
    took = sum(each.seconds for each in made.values())
    recent = [each for each in made.values() if now - each.finished <= RECENT_SECONDS]
    left = sum(stage.seconds for key, stage in plan.graph.items() if key not in made)
    if not left:
        return 0.0
    at_work = sum(each.seconds for each in recent)
    if not at_work or not expected:
        return None
    began = min(each.finished - each.seconds for each in recent)
    passed = max(1.0, min(RECENT_SECONDS, now - began))
    return left * took / expected / (at_work / passed)


def serve(page: Page, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve a page until the process is interrupted.

    Args:
        port: 0 takes a free one.
        ready: called with the page's address.

    Raises:
        OSError: if the port is taken.
    """
    with ThreadingHTTPServer((host, port), partial(_Handler, page)) as server:
        ready(f"http://{host}:{server.server_address[1]}")
        server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    """Answers two addresses, and reads nothing of a request but its path."""

    def __init__(self, page: Page, *arguments: Any) -> None:
        self.page = page
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer with the page or its figures."""
        match self.path:
            case "/":
                self._answer("text/html; charset=utf-8", PAGE.read_bytes())
            case "/state.json":
                self._answer("application/json", json.dumps(self.page.state()).encode())
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log no requests: one comes every few seconds."""
