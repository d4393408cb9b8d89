"""One sweep's folder of results, and its locks."""

from sweeps.store.store import Store, StoreUnwritable

__all__ = ["Store", "StoreUnwritable"]
