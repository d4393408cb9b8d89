"""The hub's protocol over real HTTP: what is asked for, how often, and what is said when it cannot be had."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from support.hub_server import HubServer

from llmft import hub
from llmft.config.spec import DataRef, TrialSpec
from llmft.data.sources import Source, resolve_sources
from llmft.errors import UserError
from llmft.models.info import resolve_model
from llmft.models.loading import _BASE, borrow_model, checksum, load_config, load_tokenizer
from llmft.tasks._registry import load_task

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"config.json": b"{}", "tokenizer.json": b"{ }", "merges.txt": b"a b"}
NOISE = {
    "README.md": b"hello",
    "flax_model.msgpack": b"flax",
    "tf_model.h5": b"tf",
    "onnx/config.json": b"{  }",
    "notes.pdf": b"x",
}


@pytest.fixture
def cache(new_cache) -> Path:
    return new_cache()


def n_asked(server) -> int:
    return sum(server.asked.values())


def test_only_what_is_needed_is_fetched_and_only_once(server, cache):
    commit = server.push("owner/tiny", TEXT | NOISE | {"model.safetensors": b"w" * 99_999, "pytorch_model.bin": b"v"})
    folder = hub.fetch_model("owner/tiny", "main", weights=False)
    assert folder.name == commit and {path.name for path in folder.iterdir()} == set(TEXT)
    assert hub.fetch_model("owner/tiny", "main") == folder
    assert server.n_fetched() == dict.fromkeys([*TEXT, "model.safetensors"], 1)
    assert (folder / "model.safetensors").read_bytes() == b"w" * 99_999
    before = n_asked(server)
    assert hub.fetch_model("owner/tiny", "main") == hub.fetch_model("owner/tiny", commit) == folder
    assert n_asked(server) == before


def parts(stem: str, suffix: str) -> dict[str, bytes]:
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}).encode()
    return {f"{stem}.{suffix}.index.json": index} | dict.fromkeys(names, b"part")


SAFE, PICKLED = {"model.safetensors": b"safe"}, {"pytorch_model.bin": b"pickled"}


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(SAFE | PICKLED, SAFE), (PICKLED, PICKLED), (SAFE | parts("model", "safetensors"), SAFE),
     (parts("model", "safetensors") | PICKLED, parts("model", "safetensors")), (parts("pytorch_model", "bin"),) * 2,
     (SAFE | {"model.fp16.safetensors": b"half", "consolidated.safetensors": b"other"}, SAFE)],
)  # fmt: skip
def test_the_weights_are_those_that_transformers_would_take(server, cache, offered, chosen):
    server.push("owner/tiny", TEXT | offered)
    names = {path.name for path in hub.fetch_model("owner/tiny", "main").iterdir()}
    assert {name for name in names if name not in TEXT and "index" not in name} == {n for n in chosen if "index" not in n}


LOAD = """
import sys, torch
from llmft.models.info import resolve_model
from llmft.models.loading import borrow_model, checksum, load_tokenizer
print("ready", flush=True)
sys.stdin.readline()
ref = resolve_model(sys.argv[1])
with borrow_model(ref, "fp32", torch.device("cpu"), copied=False) as model:
    print(ref.fingerprint, checksum(model.network), load_tokenizer(ref).encode("Yes or No?"))
"""


def test_parallel_workers_fetch_once_and_the_next_process_needs_no_hub(server, tmp_path, small_opt):
    commit = server.push_folder("owner/small", small_opt.path, **NOISE)
    server.delay_s = 0.3  # so that both surely ask while neither has the answer
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | {
        "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0",
    }  # fmt: skip

    def load(n_workers: int) -> list[str]:
        """What each of several processes says that begin to load at the same moment."""
        code, pipe = [sys.executable, "-c", LOAD, "owner/small"], subprocess.PIPE
        workers = [subprocess.Popen(code, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(n_workers)]
        for worker in workers:
            worker.stdout.readline()
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        return [worker.communicate(timeout=120)[0] for worker in workers]

    said = load(2)
    needed = {path.name for path in Path(small_opt.path).iterdir()}
    assert server.n_fetched() == dict.fromkeys(needed, 1)
    assert server.asked[f"GET /api/models/owner/small/tree/{commit}"] == 1
    server.stop()
    said += load(1)
    with borrow_model(small_opt, "fp32", torch.device("cpu"), copied=False) as model:
        expected = f"hub:owner/small@{commit} {checksum(model.network)} {load_tokenizer(small_opt).encode('Yes or No?')}\n"
    assert said == [expected] * 3


def test_nothing_is_asked_of_the_hub_while_a_model_is_loaded(server, cache, small_opt):
    _BASE.clear()
    server.push_folder("owner/small", small_opt.path)
    ref = resolve_model("owner/small")
    hub.fetch_model(ref.name, ref.revision)
    before = n_asked(server)
    load_config(ref), load_tokenizer(ref)
    with borrow_model(ref, "fp32", torch.device("cpu"), copied=False):
        pass
    assert n_asked(server) == before


def test_a_branch_means_what_it_meant_until_the_cache_is_moved(server, new_cache):
    from huggingface_hub import snapshot_download

    new_cache()
    first = server.push("owner/tiny", TEXT | SAFE)
    ref = resolve_model("owner/tiny")
    assert (ref.revision, ref.fingerprint) == (first, f"hub:owner/tiny@{first}")
    second = server.push("owner/tiny", TEXT | {"model.safetensors": b"other"})
    assert resolve_model("owner/tiny") == ref and resolve_model("owner/tiny", first) == ref
    assert resolve_model("owner/tiny", second).fingerprint != ref.fingerprint
    snapshot_download("owner/tiny")  # what `hf download` does
    assert resolve_model("owner/tiny").revision == second
    new_cache()
    assert resolve_model("owner/tiny").revision == second
    assert (hub.fetch_model(ref.name, ref.revision) / "model.safetensors").read_bytes() == b"safe"


def test_records_of_a_run_with_a_network_are_found_without_one(server, cache, spec_of):
    server.push("owner/tiny", TEXT | SAFE)
    spec: TrialSpec = spec_of(model=resolve_model("owner/tiny"))
    server.stop()
    assert spec_of(model=resolve_model("owner/tiny")).digest == spec.digest
    assert TrialSpec.model_validate_json(spec.model_dump_json()).model.revision == hub.pin("owner/tiny", "main")


@pytest.mark.parametrize("name", ["owner/small", "datasets/owner/rows"])
def test_a_cache_that_another_program_filled_will_do_even_if_it_can_only_be_read(server, cache, small_opt, name):
    """Files, but no listing of what there should be; and no place for a lock."""
    server.push_folder("owner/small", small_opt.path)
    server.push("datasets/owner/rows", {"all/train/0000.parquet": table(ROWS)})

    def load() -> object:
        if name == "owner/small":
            return checksum_of("owner/small")
        return Source((), ("owner/rows", None, "train", "main")).rows(DataRef())

    loaded = load()
    for tree in cache.glob("*/trees"):
        shutil.rmtree(tree)
    shutil.rmtree(cache / ".locks")
    (cache / ".locks").touch()
    sent = server.n_fetched()
    assert load() == loaded and server.n_fetched() == sent
    for tree in cache.glob("*/trees"):
        shutil.rmtree(tree)
    server.stop()
    assert load() == loaded


def checksum_of(name: str) -> str:
    _BASE.clear()
    with borrow_model(resolve_model(name), "fp32", torch.device("cpu"), copied=False) as model:
        return checksum(model.network)


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [("owner/none", "main", "there is no such repository, or it is private"),
     ("owner/tiny", "nope", "it has no such revision. Its branches and commits are listed at http"),
     ("owner/tiny", "0" * 40, "it has no such revision"),
     ("owner/gated", "main", "it is gated. Accept its terms at http"),
     ("owner/gguf", "main", "holds no config.json. Name a repository in transformers' format"),
     ("owner/bare", "main", "holds none of model.safetensors, pytorch_model.bin"),
     ("no name", "main", "no name of a repository")],
)  # fmt: skip
def test_what_cannot_be_had_is_told_at_once_in_one_line(server, cache, name, revision, said):
    server.push("owner/tiny", TEXT | SAFE)
    server.push("owner/gated", TEXT | SAFE, gated=True)
    server.push("owner/bare", TEXT)
    server.push("owner/gguf", {"model.Q4_K_M.gguf": b"GGUF", "README.md": b"weights for llama.cpp"})
    began = time.monotonic()
    with pytest.raises(UserError) as raised:
        hub.fetch_model(name, revision)
    assert said in str(raised.value) and name in str(raised.value) and "\n" not in str(raised.value)
    assert time.monotonic() - began < 3


def test_a_hub_that_goes_away_is_told_in_one_line_and_the_next_go_finishes(server, cache, monkeypatch):
    from huggingface_hub import constants

    weights = os.urandom(3_000_000)
    server.push("owner/tiny", TEXT | {"model.safetensors": weights})
    server.cut = "model.safetensors"
    for _ in range(2):
        with pytest.raises(UserError, match="llmft fetch PLAN") as raised:
            hub.fetch_model("owner/tiny", "main")
        assert "\n" not in str(raised.value)
    with HubServer() as back:
        back.repositories = server.repositories
        monkeypatch.setattr(constants, "ENDPOINT", back.address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.address, back.address),
        )
        assert (hub.fetch_model("owner/tiny", "main") / "model.safetensors").read_bytes() == weights
        assert back.n_fetched() == {"model.safetensors": 1}  # the rest was there


ROWS = [{"text": f"row {i}", "label": i % 2} for i in range(5)]


def table(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("layout", "configuration"),
    [(["rte/{}-00000-of-00002.parquet", "rte/{}-00001-of-00002.parquet"], "rte"),
     (["rte/{}/0000.parquet", "rte/{}/0001.parquet"], None)],
    ids=["pushed", "converted"],
)  # fmt: skip
def test_the_rows_of_a_split_are_its_files_in_order(server, cache, layout, configuration):
    files = {path.format("train"): table(rows) for path, rows in zip(layout, (ROWS[:3], ROWS[3:]), strict=True)}
    other = {layout[0].format("test"): table(ROWS[:1]), "README.md": b"card"}
    if configuration:
        other[layout[0].replace("rte", "cola").format("train")] = table(ROWS[:2])
    server.push("datasets/owner/rows", files | other, branch="refs/convert/parquet")
    source = Source(("x.parquet",), ("owner/rows", configuration, "train", "refs/convert/parquet"))
    assert source.rows(DataRef()) == ROWS
    assert server.n_fetched() == {path.rsplit("/", 1)[1]: 1 for path in files}


def test_the_same_content_is_the_same_data_wherever_it_lies(server, new_cache, tmp_path):
    new_cache()
    first = server.push("datasets/owner/rows", {"all/train/0000.parquet": table(ROWS)})
    source = Source(("x.parquet",), ("owner/rows", "all", "train", "main"))
    data = resolve_sources([source], None)
    assert data.commits == (("owner/rows", "main", first),) and source.origin(data) == f"owner/rows@{first}"
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "x.parquet").write_bytes(table(ROWS))
    assert resolve_sources([source], str(folder)).fingerprint == data.fingerprint
    new_cache()  # another node, later
    server.push("datasets/owner/rows", {"all/train/0000.parquet": table(ROWS[::-1])})
    assert source.rows(DataRef.model_validate_json(data.model_dump_json())) == ROWS
    assert resolve_sources([source], None).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("files", "said"),
    [({"a/test/0000.parquet": b""}, "holds none of"), ({}, "holds none of"),
     ({"a/train/0000.parquet": b"", "b/train/0000.parquet": b""}, "holds several configurations of"),
     ({"a/train/0000.parquet": b"PAR1"}, "fetch it again")],
)  # fmt: skip
def test_rows_that_are_not_there_are_told_in_one_line(server, cache, files, said):
    server.push("datasets/owner/rows", files | {"README.md": b"card"})
    with pytest.raises(UserError, match=said) as raised:
        Source(("x.parquet",), ("owner/rows", None, "train", "main")).rows(DataRef())
    assert "\n" not in str(raised.value)


def test_rte_and_hans_from_the_hub_are_those_of_the_local_copy(server, cache, data_dir):
    local = {name: (Path(data_dir) / f"{name}.parquet").read_bytes() for name in ("rte_train", "rte_validation", "hans_regenerated")}
    server.push(
        "datasets/nyu-mll/glue",
        {f"rte/{split}-00000-of-00001.parquet": local[f"rte_{split}"] for split in ("train", "validation")}
        | {"cola/train-00000-of-00001.parquet": b"not wanted"},
    )
    server.push("datasets/jhu-cogsci/hans", {"plain_text/validation/0000.parquet": local["hans_regenerated"]}, "refs/convert/parquet")
    task = load_task("rte")
    here, there = task.resolve_data(data_dir), task.resolve_data(None)
    assert here.fingerprint == there.fingerprint
    server.stop()
    loaded = task.load(there)
    assert (loaded.pool, loaded.tests) == (task.load(here).pool, task.load(here).tests)
    assert loaded.revision.startswith("jhu-cogsci/hans@")


def test_a_cache_is_fetched_anew_where_its_only_holder_was_killed(server, tmp_path, cache):
    """The lock of a process that was killed in the middle of a download does not stay."""
    server.push("owner/tiny", TEXT | SAFE)
    code = f"""
    import os, signal
    from llmft import hub
    from huggingface_hub import constants
    constants.HF_HUB_CACHE = {str(cache)!r}
    with hub._one_at_a_time("owner/tiny", "model"):
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert (cache / ".locks" / "llmft--models--owner--tiny.lock").exists()
    assert (hub.fetch_model("owner/tiny", "main") / "model.safetensors").read_bytes() == b"safe"
