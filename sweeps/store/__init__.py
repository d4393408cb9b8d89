"""One sweep's folder of results, and its locks."""

from sweeps.store.store import TRIALS, Store, StoreUnwritable

__all__ = ["Store", "StoreUnwritable", "TRIALS"]
