"""A real S3 server on loopback (moto's), which fails as often as a test wishes."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "calprune-tests"

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
INTERNAL = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>InternalError</Code>'
    b"<Message>We encountered an internal error. Please try again.</Message></Error>"
)


class S3Server:
    """Between its clients and moto: answers some requests with 503 or 500, and counts."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, True, request_handler=_Silent)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.every = 0
        """Each so many requests one fails, in turn with either answer; 0 for none."""
        self.refused = 0
        self.requests: list[str] = []
        """Method and path of each."""
        self._numbers = itertools.count(1)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    def _answer(
        self, request: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        number = next(self._numbers)
        self.requests.append(f"{request['REQUEST_METHOD']} {request['PATH_INFO']}")
        if self.every and number % self.every == 0:
            self.refused += 1
            request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
            slow = self.refused % 2 == 1
            status = "503 Slow Down" if slow else "500 Internal Server Error"
            start_response(status, [("Content-Type", "application/xml")])
            return [SLOW_DOWN if slow else INTERNAL]
        answer: Iterable[bytes] = self._moto(request, start_response)
        return answer


class _Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None: ...


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server to which the process's environment sends all of S3.

    What all servers of a process hold is the same: a bucket that one made, the next one has.
    """
    server = S3Server()
    settings = {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with contextlib.suppress(FileExistsError):
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        yield server
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.stop()
