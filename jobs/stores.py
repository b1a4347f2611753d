"""Stores as the command line names them."""

from cluster.store import Store
from jobs.grid import refuse_credentials
from pipeline.files import locate, readable


def open_store(url: str) -> Store:
    """The store at a path or URL, which need not hold anything yet.

    Raises:
        InputError: if its bucket is not there, cannot be listed or does not answer, if the URL's
            client is missing, or if the URL has credentials in it.
        StoreError: if it is a file.
    """
    refuse_credentials("store", url)
    locate(url, "store")
    store = Store(url)
    if not store.local:
        with readable("store", url):
            store.names("runs")
    return store
