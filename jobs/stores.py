"""Stores as the command line names them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.store import Store
from jobs.grid import refuse_credentials
from pipeline.errors import InputError
from pipeline.files import locate, readable

StoreUrl = Annotated[
    str,
    typer.Option(
        "--store", envvar="CALPRUNE_STORE", help="Folder or fsspec URL that keeps all artifacts."
    ),
]


def open_store(url: str) -> Store:
    """Open the store at a path or URL; it may be new.

    Raises:
        InputError: if its bucket does not exist, cannot be listed or does not answer, if the URL's
            client is missing, or if the URL holds credentials.
        StoreError: if it is a file.
    """
    refuse_credentials("store", url)
    locate(url, "store")
    store = Store(url)
    if not store.local:
        with readable("store", url):
            store.names("runs")
    return store


def writable_store(url: str) -> Store:
    """Open the store that a run writes to.

    Raises:
        InputError: as `open_store`, or if a job would lose the store with its working directory.
        StoreError: if it cannot be written to.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        check_shared(url)
    store = open_store(url)
    store.check_writable()
    return store


def check_shared(url: str) -> None:
    """Check that a store is not inside a job's working directory.

    Raises:
        InputError: if it is, or the URL holds credentials.
    """
    refuse_credentials("store", url)
    if "://" not in url and not Path(url).is_absolute():
        raise InputError(
            "store",
            url,
            "is inside the job's working directory, which is deleted with the job; "
            "give an absolute path or a URL that every node reaches",
        )
