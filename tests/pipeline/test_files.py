"""Fingerprints of files, and the errors of file systems and their clients, one line each."""

import shutil
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
    """Remove all credentials, servers and remembered answers."""
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
    with_keys(environment, "nowhere")
    assert "Invalid endpoint: nowhere" in refused("s3://bucket-d/notes.jsonl")
    environment.setattr(files, "ANSWER_SECONDS", 1.0)  # now the client has been imported
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with_keys(environment, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "does not answer" in refused("s3://bucket-e/notes.jsonl")


def test_a_missing_bucket_is_named_and_an_existing_one_is_read(
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


def test_a_fingerprint_follows_names_and_contents_but_not_the_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "elsewhere" / "two"
    (one / "sub").mkdir(parents=True)
    (one / "a.jsonl").write_text("abc")
    (one / "sub" / "b.jsonl").write_text("def")
    shutil.copytree(one, two)
    before = fingerprint(str(one))
    assert before == fingerprint(str(two)) == fingerprint(f"{one}/**")
    (one / ".hidden").write_text("x")
    (one / "__pycache__").mkdir()
    (one / "__pycache__" / "x.pyc").write_text("x")
    assert fingerprint(str(one)) == before
    seen = {before}
    for path, content in (("a.jsonl", "abd"), ("a.jsonl", "abcd"), ("c.jsonl", "")):
        shutil.rmtree(two)
        shutil.copytree(one, two)
        (two / path).write_text(content)
        seen.add(fingerprint(str(two)))
    assert len(seen) == 4
    with pytest.raises(InputError, match="no file"):
        fingerprint(str(tmp_path / "nothing"))


def test_moving_bytes_between_files_changes_the_fingerprint(tmp_path: Path) -> None:
    for folder, first, second in (("one", "ab", "c"), ("two", "a", "bc")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1").write_text(first)
        (tmp_path / folder / "2").write_text(second)
    assert fingerprint(str(tmp_path / "one")) != fingerprint(str(tmp_path / "two"))


def test_a_large_weight_file_is_fingerprinted_by_64_pieces(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 129 * 2**20
    places = {"begin": 0, "between": 3 * 2**19, "looked at": 5 * 2**19, "end": size - 1}
    found = {}
    for name, place in places.items():
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(place)
            file.write(b"x")
        found[name] = fingerprint(str(path), whole_files=False)
        if name == "between":
            assert fingerprint(str(path)) != fingerprint(str(path), whole_files=False)
    with path.open("wb") as file:
        file.truncate(size)
    zeros = fingerprint(str(path), whole_files=False)
    assert [name for name in places if found[name] != zeros] == ["begin", "looked at", "end"]
