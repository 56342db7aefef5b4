"""Downloads that give up in seconds; the libraries' own clients retry for a minute and more."""

from __future__ import annotations

import http.client
import importlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

TIMEOUT_SECONDS = 4.0  # for a server to answer


@contextmanager
def hub_or_cache(needed: bool = True) -> Iterator[None]:
    """Use only the cache where the Hugging Face hub does not answer; `ConnectionError` where it has no such model."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not needed or os.environ.get("HF_HUB_OFFLINE") or is_reachable(address):
        yield
        return
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"{address} does not answer, and nothing is cached") from error
    finally:
        constants.HF_HUB_OFFLINE = before
        del os.environ["HF_HUB_OFFLINE"]


@contextmanager
def socket_timeout() -> Iterator[None]:
    """Set a limit for clients that have none of their own, such as torch.hub."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def is_reachable(address: str, seconds: float = TIMEOUT_SECONDS) -> bool:
    """Return whether a server can be reached, through the proxies of the environment."""
    reached = threading.Event()

    def request() -> None:
        with suppress(OSError, ValueError, http.client.HTTPException):
            with suppress(HTTPError):  # that is an answer too
                urlopen(Request(address, method="HEAD"), timeout=seconds).close()
            reached.set()

    # On a thread, as looking up a name has no limit.
    threading.Thread(target=request, name="attn_monitor-connection", daemon=True).start()
    return reached.wait(seconds)
