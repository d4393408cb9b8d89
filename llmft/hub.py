"""The hub: a revision is resolved to a commit once, its files are fetched once, and after that nothing is asked of the network.

A branch or tag means the commit that the cache knows for it, and is asked for only where the cache knows none, as Docker does
with the tag of an image. So a sweep that is stopped goes on with the model that it began with even if someone edits the model's
card meanwhile, and the same plan gives the same trials with and without a network. To follow a branch that has moved, name the
new commit as revision, or run `hf download NAME`, which moves the cache's branch.

The cache is that of huggingface_hub (HF_HOME, HF_HUB_CACHE), whoever filled it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from llmft.errors import UserError

TIMEOUT_S = 5.0
MODEL_TEXT = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.jinja")
"""Configuration, tokenizer and the index of the weights; a few MB."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Whole files, or the stems of an index; the first that there is, as transformers chooses."""


def is_reachable(endpoint: str) -> bool:
    """Whether a connection to the hub can be opened (True behind a proxy, where only the client can tell)."""
    url = urlsplit(endpoint)
    if getproxies().keys() & {url.scheme, "all"} and not proxy_bypass(url.hostname):
        return True
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), TIMEOUT_S).close()
    except OSError:
        return False
    return True


@contextmanager
def hub_access(offline: bool = False) -> Iterator[None]:
    """Inside, the hub's client uses what lies in its cache alone if `offline`, or where the hub cannot be reached.

    Left to itself it would try for half a minute before it says that there is no network.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or offline or not is_reachable(constants.ENDPOINT)
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def pin(name: str, revision: str, kind: str = "model") -> str:
    """The commit (40 hexadecimal digits) that a revision of a repository means.

    Args:
        name: `owner/name` on the hub.
        revision: a branch, a tag or a commit.
        kind: "model" or "dataset".

    Raises:
        UserError: there is no such repository or revision, or the hub cannot be reached and the cache does not know it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    api = HfApi()
    with _told_in_one_line(name, revision, kind):
        try:
            return api.resolve_revision(name, repo_type=kind, revision=revision, local_files_only=True).resolved
        except RevisionResolutionError:
            with hub_access():
                return api.resolve_revision(name, repo_type=kind, revision=revision).resolved


def fetch(name: str, commit: str, patterns: Sequence[str], kind: str = "model") -> Path:
    """The local folder of a repository's commit, with the files that match `patterns`.

    What the cache holds is neither looked for nor asked for on the network. Of several processes that miss the same files one
    fetches them and the others wait.

    Args:
        patterns: as of `fnmatch`; `*` matches `/` as well. Of a model, files in folders are left out: other formats lie there.
        name, commit, kind: as of `pin`.

    Raises:
        UserError: it cannot be fetched.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    folders = ["*/*"] if kind == "model" else None
    which = {"repo_type": kind, "revision": commit, "allow_patterns": list(patterns), "ignore_patterns": folders}
    with _told_in_one_line(name, commit, kind):
        try:
            get_cached_repo_tree(name, repo_type=kind, revision=commit)  # without it nobody could tell what is missing
            return Path(snapshot_download(name, local_files_only=True, **which))
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            with _one_at_a_time(name, kind), hub_access():
                return Path(snapshot_download(name, **which))


def fetch_model(name: str, revision: str, weights: bool = True) -> Path:
    """A local folder with a model's configuration and tokenizer, and its weights if asked for: safetensors, or else pickled.

    Raises:
        UserError: it cannot be fetched, or holds no configuration or weights that transformers reads.
    """
    commit = pin(name, revision)
    folder = fetch(name, commit, MODEL_TEXT)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model: {name} at commit {commit} holds no config.json. Name a repository in transformers' format (GGUF is another)."
        )
    return fetch(name, commit, _weight_files(name, commit, folder)) if weights else folder


def _weight_files(name: str, commit: str, folder: Path) -> list[str]:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        names = {file.path for file in get_cached_repo_tree(name, revision=commit)}
    except CachedRepoTreeNotFoundError:  # a cache that another program filled, and no network
        names = {path.name for path in folder.iterdir()}
    for whole in WEIGHTS:
        if whole in names:
            return [whole]
        if (index := f"{whole}.index.json") in names:
            return sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    raise UserError(f"model: {name} at commit {commit} holds none of {', '.join(WEIGHTS)}, whole or in parts.")


@contextmanager
def _one_at_a_time(name: str, kind: str) -> Iterator[None]:
    """Keeps other processes that use the same cache from fetching the same repository meanwhile."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    lock = Path(constants.HF_HUB_CACHE, ".locks", f"llmft--{kind}s--{name.replace('/', '--')}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError:  # a cache that can only be read: there is nothing to keep apart
        yield
        return
    with WeakFileLock(lock):
        yield


@contextmanager
def _told_in_one_line(name: str, revision: str, kind: str) -> Iterator[None]:
    """Turns what the hub's client raises into a `UserError`."""
    try:
        yield
    except Exception as error:  # its client raises a dozen kinds, and those of its HTTP library
        what = {"model": "model", "dataset": "data"}[kind]
        raise UserError(f"{what}: cannot get {name}, revision {revision}, from the hub: {_reason(error, name, kind)}") from None


def _reason(error: Exception, name: str, kind: str) -> str:
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    instead = "give a local folder" + (" by --data-dir" if kind == "dataset" else "")
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated. Accept its terms at {address}, and log in with `hf auth login` or HF_TOKEN; on every node."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision. Its branches and commits are listed at {address}."
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 404):  # the hub tells the two not apart
        return "there is no such repository, or it is private. Check the name, or log in with `hf auth login` or HF_TOKEN."
    if isinstance(error, errors.HFValidationError):
        return f"this is no name of a repository. Give owner/name, or {instead}."
    behind = isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError) and error.__cause__
    cause = behind or error
    offline = isinstance(cause, errors.OfflineModeIsEnabled)
    said = f"{constants.ENDPOINT} cannot be reached" if offline else " ".join(str(cause).split())[:160]
    return (
        f"{said}, and it is not (or not whole) in the cache {constants.HF_HUB_CACHE}. Check the name and the network, "
        f"fetch it beforehand with `llmft fetch PLAN`, or {instead}."
    )
