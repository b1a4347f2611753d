"""Whether the hub answers, asked once."""

import functools
import http.client
import os
import urllib.error
import urllib.request

from pipeline.errors import InputError

DEFAULT_ENDPOINT = "https://huggingface.co"


@functools.cache
def hub_answers() -> bool:
    """One try, of ten seconds at the most: the hub's own client retries for most of a minute.

    Raises:
        InputError: if HF_ENDPOINT is no URL.
    """
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT)
    if not endpoint.startswith(("https://", "http://")):
        remedy = f"HF_ENDPOINT is no URL: write {DEFAULT_ENDPOINT}, or a mirror's with https://"
        raise InputError("HF_ENDPOINT", endpoint, remedy)
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True
