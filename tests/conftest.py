from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest
from support.hub_server import HubServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """One Ray at a time: the tests that start one all go to the same process, every other test to whichever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if _starts_ray(nodeid) else nodeid

    return OneRay(config, log)


def _starts_ray(nodeid: str) -> bool:
    """Whether a test, or its whole file, has the mark; the scheduler knows no more of tests than their names."""
    file, _, name = nodeid.partition("[")[0].partition("::")
    text = _read(file)
    return "pytestmark = pytest.mark.ray" in text or re.search(rf"@pytest\.mark\.ray\n(@.*\n)*def {name}\(", text) is not None


@cache
def _read(file: str) -> str:
    return (ROOT / file).read_text()


@pytest.fixture(scope="session")
def data_dir() -> str:
    """The folder with RTE and HANS; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LLMFT_TEST_DATA", ROOT.parent / "shared" / "data"))
    for name in ("rte_train.parquet", "rte_validation.parquet", "hans_regenerated.parquet"):
        if not (folder / name).is_file():
            pytest.skip(f"no {name} in {folder}: set LLMFT_TEST_DATA to a folder that holds it")
    return str(folder)


STANDS_IN = {  # test data -> the name of the complete file that it stands for
    "rte_train.parquet": "rte_train.parquet", "rte_validation.parquet": "rte_validation.parquet",
    "hans_regenerated.parquet": "hans_regenerated.parquet",
    "mnli_train_subset.parquet": "mnli_train.parquet", "mnli_validation_matched.parquet": "mnli_validation_matched.parquet",
    "mnli_validation_mismatched_hard.parquet": "mnli_validation_mismatched.parquet",
    "qqp_subset_a.parquet": "qqp_train.parquet", "paws_qqp/dev_and_test.tsv": "paws_qqp.tsv",
    "cola_train.parquet": "cola_train.parquet", "cola_validation.parquet": "cola_validation.parquet",
    "cola_ood/dev.tsv": "cola_ood.tsv",
}  # fmt: skip


@pytest.fixture(scope="session")
def task_data(data_dir, tmp_path_factory) -> str:
    """A folder with the files of every task, some of them a part of the real ones; skipped where one is absent."""
    folder = tmp_path_factory.mktemp("data")
    for name, stands_for in STANDS_IN.items():
        if not (path := Path(data_dir).resolve() / name).is_file():
            pytest.skip(f"no {name} in {data_dir}: set LLMFT_TEST_DATA to a folder that holds it")
        (folder / stands_for).symlink_to(path)
    (folder / "qqp_validation.parquet").symlink_to(folder / "qqp_train.parquet")
    return str(folder)


@pytest.fixture
def server():
    """A hub on this machine."""
    with HubServer() as server:
        yield server


@pytest.fixture
def new_cache(monkeypatch, tmp_path, server):
    """Gives this process the server as its hub, and an empty cache each time it is called."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def make() -> Path:
        cache = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        cache.mkdir()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        return cache

    return make


@pytest.fixture(scope="module")
def s3():
    """An S3 server with an empty bucket."""
    for module in ("moto", "flask", "flask_cors", "boto3"):
        pytest.importorskip(module, reason="needs moto[s3], flask and flask-cors (pip install -e '.[test]')")
    from support.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def url(s3, request) -> str:
    """A prefix of its own for each test, as a URL."""
    return s3.url(request.node.name.replace("[", "-").strip("]"))


@pytest.fixture
def prefix(url) -> str:
    from llmft.records.storage import open_folder

    return open_folder(url).key
