"""Named streams of randomness: what is drawn for one purpose never depends on what was drawn for another."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name`; the same on every machine and version of Python."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str) -> np.random.Generator:
    """The random generator of the stream `name`."""
    return np.random.Generator(np.random.PCG64(derive(seed, name)))
