"""Whether the hub answers, asked once."""

import functools
import os
import urllib.error
import urllib.request

DEFAULT_ENDPOINT = "https://huggingface.co"


@functools.cache
def hub_answers() -> bool:
    """One try, of ten seconds at the most: the hub's own client retries for most of a minute."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT)
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
