"""Results on object storage, against a real S3 server (moto's) in a process of its own."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from support.fakes import fake_record, fake_trial
from support.s3_server import BUCKET

import analysis
from analysis.frames.predictions import open_predictions
from llmft.errors import UserError
from llmft.records.record_files import read_records, write_record
from llmft.records.storage import N_READERS, UrlPath, open_folder, read_many, reason, write_atomically
from sweeps.run import SweepOptions, run_sweep
from sweeps.store import store as store_module
from sweeps.store.store import Store, StoreUnwritable

QUIET = Console(quiet=True)


@pytest.fixture
def record(small_cells):
    return fake_record(small_cells()[1][0].base)


def python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, text=True)


# Names


def test_a_url_keeps_its_options_wherever_one_goes():
    root = open_folder("s3://bucket/a b//c#1%20/?region=x&scheme=http")
    assert str(root) == "s3://bucket/a b/c#1%20?region=x&scheme=http"
    inside = root / "trials" / "abc"
    assert str(inside) == "s3://bucket/a b/c#1%20/trials/abc?region=x&scheme=http" and inside.name == "abc"
    assert open_folder(str(inside)) == inside == open_folder(inside) and inside.parent.parent == root
    assert str(open_folder("gs://bucket") / "x") == "gs://bucket/x"


def test_what_is_no_url_is_a_folder(tmp_path):
    assert open_folder("results/a:b") == Path("results/a:b") and open_folder(tmp_path) == tmp_path
    assert open_folder("file:///mnt/my%20results") == Path("/mnt/my results")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s4://bucket/x", "Did you mean 's3://'"),
        ("https://bucket.s3.amazonaws.com/x", "Allowed: file://, gs://, s3://"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("file://results/x", "file:///PATH"),
        ("s3://key:secret@bucket/x", "credentials do not belong in a URL"),
        ("s3://localhost:9000/bucket", "endpoint_override=localhost:9000"),
        (Path("s3://bucket/x"), "hand it over as text"),
    ],
)
def test_a_url_that_means_nothing_is_one_clear_line(url, said):
    with pytest.raises(UserError, match=said) as raised:
        Store(url)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


def test_many_places_are_read_at_once_and_come_in_their_order():
    together = threading.Barrier(N_READERS)  # passed only by as many that read at the same time

    def read(number):
        together.wait(30)
        return number * 2

    assert list(read_many(read, range(2 * N_READERS))) == list(range(0, 4 * N_READERS, 2))


# Objects


@pytest.mark.parametrize("n_bytes", [0, 10, 12 * 2**20])  # the last takes several parts
def test_what_is_written_is_read(s3, url, n_bytes):
    root, content = open_folder(url), os.urandom(n_bytes)
    assert not root.exists() and not root.is_dir() and root.rglob("*") == []
    write_atomically(root / "a/file", b"earlier")
    write_atomically(root / "a/file", content)
    assert (root / "a/file").read_bytes() == content
    assert s3.client.get_object(Bucket=BUCKET, Key=f"{root.key}/a/file")["Body"].read() == content
    assert (root / "a").is_dir() and (root / "a/file").exists() and not (root / "a/file").is_dir()
    assert root.rglob("fi*") == [root / "a/file"] and root.rglob("*.json") == []
    (root / "a/file").unlink()
    (root / "a/file").unlink(missing_ok=True)
    for absent in (lambda: (root / "a/file").read_bytes(), lambda: (root / "a/file").unlink()):
        with pytest.raises(FileNotFoundError):
            absent()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=lambda stop: stop.name)
def test_a_writer_stopped_in_the_middle_publishes_no_half_object(s3, url, prefix, stop):
    n_bytes = 48 * 2**20
    code = f"""
    import sys
    from llmft.records.storage import open_folder
    content = bytes({n_bytes})
    print("ready", flush=True)
    (open_folder(sys.argv[1]) / "big").write_bytes(content)
    """
    with python(code, url) as writer:
        assert writer.stdout.readline() == "ready\n"
        _wait(lambda: _n_parts(s3, f"{prefix}/big") >= 1)  # it is in the middle
        writer.send_signal(stop)
        writer.wait(60)
    lengths = [s3.client.head_object(Bucket=BUCKET, Key=f"{prefix}/{key}")["ContentLength"] for key in s3.keys(prefix)]
    assert lengths == [] if stop == signal.SIGKILL else lengths in ([], [n_bytes])


def _n_parts(s3, key):
    uploads = s3.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    found = [upload["UploadId"] for upload in uploads if upload["Key"] == key]
    return len(s3.client.list_parts(Bucket=BUCKET, Key=key, UploadId=found[0]).get("Parts", [])) if found else 0


def _wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_many_writers_leave_only_whole_records(url, record):
    code = """
    import sys
    from llmft.records.storage import open_folder
    from llmft.records.record import TrialRecord
    from llmft.records.record_files import write_record
    root, record, number = open_folder(sys.argv[1]), TrialRecord.model_validate_json(sys.argv[2]), sys.argv[3]
    for i in range(5):
        for digest in ("shared", f"own{number}-{i}"):
            message = number * (1000 + int(number) * 100)  # of different lengths
            write_record(root / digest, record.model_copy(update={"digest": digest, "message": message}), b"predictions")
    """
    writers = [python(code, url, record.model_dump_json(), str(number)) for number in range(8)]
    assert [writer.wait(120) for writer in writers] == [0] * 8
    for writer in writers:
        writer.stdout.close()
    found = {one.digest: one.message for one in read_records(url)}
    own = {f"own{number}-{i}": str(number) * (1000 + number * 100) for number in range(8) for i in range(5)}
    assert found.keys() == {*own, "shared"} and own.items() <= found.items()
    assert found["shared"] in own.values()


def test_the_store_does_on_a_url_what_it_does_in_a_folder(url, record, small_cells, tmp_path):
    from sweeps.search.schedule import Schedule

    plan, cells = small_cells()
    schedule = Schedule(cells)
    for root in (url, tmp_path / "results"):
        store = Store(root)
        assert store.get(record.digest) is None and store.load() == {}
        with store.locked():
            (store.folder(record.digest) / "predictions.parquet").parent.mkdir(parents=True, exist_ok=True)
            write_atomically(store.folder(record.digest) / "predictions.parquet", b"half")
            assert store.get(record.digest) is None and store.load() == {}
            store.put(record, b"predictions")
            assert store.get(record.digest).dev_score == record.dev_score and list(store.load()) == [record.digest]
            assert store.write_plan(plan) is False and store.write_plan(plan) is False
            assert store.write_plan(plan.model_copy(update={"n_dev": 8})) is True
            store.write_manifest(plan, schedule, {})
            store.discard(record.digest)
            assert store.load() == {}
        write_atomically(store.folder(record.digest) / "record.json", b"{")
        for read in (store.load, lambda store=store: store.get(record.digest)):
            with pytest.raises(UserError, match="not a readable record"):
                read()
    for name in ("plan.yaml", "sweep.json"):
        assert (Store(url).root / name).read_bytes() == (tmp_path / "results" / name).read_bytes()


@pytest.mark.long
def test_thousands_of_records_are_listed_and_read(url, record):
    """Prints how long; more than one page of a listing, which holds 1,000 objects."""
    root, digests = open_folder(url) / "trials", [f"{number:05x}" for number in range(2000)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda digest: write_record(root / digest, record.model_copy(update={"digest": digest})), digests))
    started = time.perf_counter()
    assert list(Store(url).load()) == digests
    print(f"2,000 records read in {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    for digest in digests[:200]:
        Store(url).get(digest)
    print(f"one after the other they would take {10 * (time.perf_counter() - started):.1f} s")


# What goes wrong


def test_mistakes_are_said_before_anything_runs(s3, url, record, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = {
        s3.url("x", bucket="nowhere"): "there is no such bucket",
        url + "&bogus=1": "not a usable URL .*bogus",
        f"s3://results/x?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1": "nothing answers",
    }
    for root, expected in said.items():
        with pytest.raises(UserError, match=expected) as raised, Store(root).locked():
            pass
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_credentials_that_are_wrong_or_may_only_read(s3, record, monkeypatch):
    import urllib.request

    def require_credentials(after_n_requests: str):
        plain = {"Content-Type": "text/plain"}
        urllib.request.urlopen(
            urllib.request.Request(f"{s3.endpoint}/moto-api/reset-auth", after_n_requests.encode(), plain, method="POST")
        ).close()

    iam = s3.connect("iam")
    iam.create_user(UserName="reader")
    allowed = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    reader = iam.create_access_key(UserName="reader")["AccessKey"]
    Store(s3.url("credentials")).put(record)
    require_credentials("0")
    try:
        wrong = s3.url("credentials").replace("us-east-1", "us-east-2")  # a connection of its own, made with these credentials
        for attempt in (lambda: Store(wrong).load(), lambda: analysis.load(wrong), Store(wrong).locked().__enter__):
            with pytest.raises(UserError, match="access is denied: give this machine's environment"):
                attempt()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", reader["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", reader["SecretAccessKey"])
        read_only = Store(s3.url("credentials").replace("us-east-1", "us-west-1"))
        assert list(read_only.load()) == [record.digest]
        with pytest.raises(StoreUnwritable, match="cannot be written here .*access is denied"), read_only.locked():
            pass
        with pytest.raises(StoreUnwritable, match="can no longer be written .*access is denied.* same command again") as raised:
            read_only.put(record)
        with pytest.raises(UserError, match="report cannot be written .*access is denied"):
            analysis.write_report(read_only.root)
    finally:
        require_credentials("inf")
    copied = pickle.loads(pickle.dumps(raised.value))
    assert type(copied) is StoreUnwritable and str(copied) == str(raised.value)


THROTTLED = OSError("When uploading: AWS Error SLOW_DOWN during PutObject operation: Reduce your request rate (Request ID: x)")


def test_what_may_pass_is_waited_for(url, record, monkeypatch):
    failures = [THROTTLED, THROTTLED]
    monkeypatch.setattr(store_module, "WAITS_S", (0.01, 0.01))
    whole = UrlPath.write_bytes

    def write_bytes(path, content):
        if failures:
            raise failures.pop()
        whole(path, content)

    monkeypatch.setattr(UrlPath, "write_bytes", write_bytes)
    store = Store(url)
    store.put(record)
    assert store.get(record.digest) is not None and failures == []
    failures += [THROTTLED] * 3
    with pytest.raises(StoreUnwritable, match=r"\(SLOW_DOWN: Reduce your request rate\)"):
        store.put(record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of PerformWork() - CURL error [7]=Could "
            "not connect to server error_info={reason=, domain=})",
            "nothing answers; UNAVAILABLE: PerformWork() - CURL error [7]=Could not connect to server",
        ),
        (
            "google::cloud::Status(NOT_FOUND: Permanent error, with a last message of Received HTTP status code: 404 error_info={})",
            "there is no such bucket; NOT_FOUND: Received HTTP status code: 404",
        ),
        (
            "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of Could not create a OAuth2 access token "
            "error_info={})",
            "access is denied: give this machine's environment, configuration or role credentials that may do this; UNAVAILABLE: Could "
            "not create a OAuth2 access token",
        ),
    ],
)
def test_what_google_says_is_said_in_short(text, expected):
    """The texts are those of pyarrow 26 against an emulator, shortened."""
    assert reason(OSError(text)) == expected


# The whole way


@pytest.fixture
def one_thread():
    """As many as a worker has; the sums are then the same to the last bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _comparable(record):
    return record.model_dump(exclude={"cost", "provenance"})


@pytest.mark.long
@pytest.mark.ray
def test_a_sweep_on_ray_and_a_url_is_that_of_one_process_and_a_folder(s3, url, prefix, tmp_path, plan_file, tiny_model, capsys, one_thread):
    from sweeps.cli.app import _run
    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import load_plan
    from sweeps.ray_backend.session import ray_session

    smaller = [("n_trials: 4", "n_trials: 2"), ("seeds: [0, 1, 2]", "seeds: [0, 1]"), ("n_shots: [2, 4]", "n_shots: [2]")]
    path = str(plan_file(*smaller, model=tiny_model))
    plan, where = load_plan(path)
    cells = build_cells(plan, where)
    with ray_session(None, n_cpus=2):
        outcomes = [run_sweep(plan, cells, url, console=QUIET)]
    outcomes.append(run_sweep(plan, cells, tmp_path / "results", SweepOptions(serial=True), console=QUIET))
    assert [(outcome.n_finished, outcome.n_failed) for outcome in outcomes] == [(9, 0), (9, 0)]
    remote, local = Store(url).load(), Store(tmp_path / "results").load()
    assert {digest: _comparable(record) for digest, record in remote.items()} == {
        digest: _comparable(record) for digest, record in local.items()
    }
    written = {str(file.relative_to(tmp_path / "results")) for file in (tmp_path / "results").rglob("*") if file.is_file()}
    assert set(s3.keys(prefix)) == written - {".lock", "studies.log"}
    for name in written:
        if name.endswith(("predictions.parquet", "plan.yaml", "sweep.json")):
            assert (open_folder(url) / name).read_bytes() == (tmp_path / "results" / name).read_bytes()

    digest = next(record.digest for record in remote.values() if record.predictions_sha256)
    tables = [open_predictions(root, digest).to_table() for root in (url, tmp_path / "results")]
    assert tables[0].num_rows > 0 and tables[0].equals(tables[1]) and set(tables[0]["digest"].to_pylist()) == {digest}

    capsys.readouterr()
    assert _run(["sweep", path, "--serial", "--out", url]) == 0
    assert f"9 trials finished, 0 failed; 0 ran now. Records: {open_folder(url) / 'trials'}" in capsys.readouterr().out
    assert _run(["plan", path, "--out", url]) == 0
    shown = capsys.readouterr().out
    assert "search: 4 trials, 0 new, 4 done, 0 failed" in shown and f"results: {url}; nothing was started" in shown
    shown = {}
    for root in (url, str(tmp_path / "results")):
        assert _run(["report", root]) == 0
        shown[root], _, page = capsys.readouterr().out.rpartition("Report: ")
        assert "".join(page.split()) == str(open_folder(root) / "report/report.html")
    assert shown[url] == shown[str(tmp_path / "results")]
    for name in ("tables/comparison.md", "tables/comparison.csv", "tables/groups.csv", "figures/scatter.svg"):
        assert (open_folder(url) / "report" / name).read_bytes() == (tmp_path / "results/report" / name).read_bytes()
    assert (open_folder(url) / "report/report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_trial_from_the_command_line_is_kept_under_its_url(s3, url, prefix, tiny_model, capsys):
    from sweeps.cli.app import _run

    arguments = [
        "trial",
        "--task",
        "toy",
        "--method",
        "zero_shot",
        "--model",
        tiny_model,
        "--set",
        "n_test=8",
        "--json",
        "--out",
        url,
    ]
    assert _run(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert set(s3.keys(prefix)) == {f"trials/{first['digest']}/{name}" for name in ("record.json", "predictions.parquet")}
    assert _run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["cost"] == first["cost"]  # read, not run again


def test_a_sweep_that_was_stopped_goes_on_where_it_was(url, small_cells, tmp_path):
    plan, cells = small_cells()
    log = str(tmp_path / "log")

    def run_trial(spec, runtime):
        if len(Store(url).load()) == 5:
            raise KeyboardInterrupt
        return fake_trial(spec, runtime, log=log)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan, cells, url, SweepOptions(serial=True), console=QUIET, run_trial=run_trial)
    outcome = run_sweep(plan, cells, url, SweepOptions(serial=True), console=QUIET, run_trial=partial(fake_trial, log=log))
    assert (outcome.n_finished, outcome.n_new) == (26, 21)
