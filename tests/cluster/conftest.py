"""An S3 server for tests of the store."""

from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server
