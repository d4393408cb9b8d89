"""Seeds and named streams of randomness: what is drawn for one purpose never depends on what was drawn for another."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import numpy as np

SeedName = Literal["data", "order", "init", "dropout"]
"""What has a seed of its own: which examples are drawn, their order, the weights that are added, dropout."""

SEED_NAMES: tuple[SeedName, ...] = get_args(SeedName)
SEED_FIELDS = tuple(f"{name}_seed" for name in SEED_NAMES)
"""Names of the seeds in a spec, and of their columns."""


def derive(seed: int, name: str) -> int:
    """Derive a 63-bit seed for the stream `name`; the same on every machine and version of Python."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str) -> np.random.Generator:
    """Make the random generator of the stream `name`."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(derive(seed, name)))
