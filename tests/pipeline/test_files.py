"""Errors of file systems and of their clients, as one line each."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

from pipeline import files
from pipeline.errors import InputError
from pipeline.files import fingerprint, locate
from tests.s3 import BUCKET, s3_server

AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Neither credentials nor a server are known, and nothing was asked before."""
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    yield monkeypatch
    files._ask.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def with_keys(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    environment.setenv("AWS_ACCESS_KEY_ID", "tests")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    environment.setenv("AWS_ENDPOINT_URL", endpoint)


def refused(url: str) -> str:
    with pytest.raises(InputError) as error:
        fingerprint(url, field="corpora.notes.path")
    assert str(error.value).startswith(f"corpora.notes.path: '{url}': ")
    assert len(str(error.value)) < 300
    return error.value.remedy


def test_credentials_that_are_missing_are_named(environment: pytest.MonkeyPatch) -> None:
    assert "no credentials: set AWS_ACCESS_KEY_ID" in refused("s3://bucket-a/notes.jsonl")
    environment.setenv("AWS_ACCESS_KEY_ID", "tests")
    assert "credentials are incomplete" in refused("s3://bucket-b/notes.jsonl")
    environment.setenv("AWS_PROFILE", "nobody")
    assert "no such profile" in refused("s3://bucket-c/notes.jsonl")


def test_waiting_ends_for_a_server_that_is_missing_or_silent(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setattr(files, "ANSWER_SECONDS", 1.0)
    with_keys(environment, "nowhere")
    assert "Invalid endpoint: nowhere" in refused("s3://bucket-d/notes.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with_keys(environment, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "does not answer" in refused("s3://bucket-e/notes.jsonl")


def test_a_bucket_that_is_not_there_is_named_and_one_that_is_can_be_read(
    environment: pytest.MonkeyPatch,
) -> None:
    with s3_server() as server:
        with_keys(environment, server.endpoint)
        assert "no such bucket" in refused("s3://no-such-bucket/notes.jsonl")
        assert "no file is there" in refused(f"s3://{BUCKET}/none/*.jsonl")
        filesystem, _ = locate(f"s3://{BUCKET}")
        filesystem.pipe_file(f"{BUCKET}/files/notes.jsonl", b"text")
        local = fsspec.filesystem("memory")
        local.pipe_file("/files/notes.jsonl", b"text")
        found = fingerprint(f"s3://{BUCKET}/files/*.jsonl")
        assert found == fingerprint("memory://files/notes.jsonl")


def test_a_client_that_is_not_installed_is_named_with_its_extra(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setitem(sys.modules, "gcsfs", None)
    environment.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    assert "install calprune[gcs]" in refused("gs://bucket-f/notes.jsonl")
    assert "not installed: Install adlfs" in refused("abfs://c@a/notes.jsonl")
