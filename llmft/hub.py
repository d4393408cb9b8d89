"""The hub, when it cannot be reached: its clients would retry for a minute before they say so."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

TIMEOUT_S = 5.0


def is_reachable(endpoint: str) -> bool:
    """Whether a connection to the hub can be opened (True behind a proxy, where only the client can tell)."""
    if getproxies():
        return True
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), TIMEOUT_S).close()
    except OSError:
        return False
    return True


@contextmanager
def hub_access() -> Iterator[None]:
    """Inside, the clients of the hub use what they have in their caches alone where the hub cannot be reached."""
    from huggingface_hub import constants

    clients = [constants, *filter(None, [sys.modules.get("datasets.config")])]  # each keeps a flag of its own
    before = [client.HF_HUB_OFFLINE for client in clients]
    offline = constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT)
    try:
        for client in clients:
            client.HF_HUB_OFFLINE = offline
        yield
    finally:
        for client, flag in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = flag
