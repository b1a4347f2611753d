"""Stores as the command line names them."""

from typing import Annotated

import typer

from cluster.store import Store
from jobs.grid import refuse_credentials
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
