"""One sweep at a time on a folder; on object storage, a warning of a second."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from llmft.errors import UserError
from llmft.records.storage import open_folder
from sweeps.store.locks import MARKER_FILE
from sweeps.store.store import Store, StoreUnwritable

HOLDER = """
import sys, time
from sweeps.store.store import Store
with Store(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start_sweep():
    """Starts a process that holds the lock of a folder."""
    processes = []

    def start(root):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_sweep_of_a_folder_is_refused_and_a_killed_one_leaves_nothing_in_the_way(tmp_path, start_sweep):
    first = start_sweep(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=f"another sweep is running .*process {first.pid} on {socket.gethostname()}") as raised:
            Store(tmp_path).locked().__enter__()
        assert "\n" not in str(raised.value)
    first.kill()
    first.wait()
    with Store(tmp_path).locked(), pytest.raises(UserError, match=f"process {os.getpid()} "), Store(tmp_path).locked():
        pass
    with Store(tmp_path).locked():
        assert (tmp_path / MARKER_FILE).exists()
    assert not (tmp_path / MARKER_FILE).exists()


def test_a_sweep_that_fails_frees_the_folder(tmp_path):
    with pytest.raises(OSError, match="a mistake of the sweep"), Store(tmp_path).locked():
        raise OSError("a mistake of the sweep")
    with Store(tmp_path).locked():
        pass


def refuse_locks(monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_that_knows_no_locks_gets_a_lock_file(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.ENOSYS)
    with Store(tmp_path).locked(), pytest.raises(UserError, match=f"process {os.getpid()} "), Store(tmp_path).locked():
        pass
    with Store(tmp_path).locked():
        pass


def test_a_file_system_that_refuses_locks_is_said_in_one_line(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.ENOLCK)
    with pytest.raises(StoreUnwritable, match=r"results cannot be written here \(No locks available\)") as raised, Store(tmp_path).locked():
        pass
    assert "\n" not in str(raised.value)


def test_on_object_storage_a_second_sweep_is_warned_of_and_runs(s3, url, prefix, start_sweep, capsys):
    first, said = start_sweep(url), []
    with Store(url).locked(said.append):
        assert len(said) == 1 and f"another sweep may be running here (process {first.pid} on {socket.gethostname()}" in said[0]
    first.kill()
    first.wait()
    with Store(url).locked():
        pass
    assert capsys.readouterr().err == "" and s3.keys(prefix) == []


def test_a_marker_warns_unless_its_process_has_ended(url, start_sweep, tmp_path, capsys):
    marker = open_folder(url) / MARKER_FILE
    ended = subprocess.Popen(["true"])
    ended.wait()
    for holder, warned in ((f"{ended.pid} on {socket.gethostname()} since ...", False), (f"{ended.pid} on another since ...", True)):
        marker.write_bytes(holder.encode())
        with Store(url).locked():
            pass
        assert (f"process {holder}" in capsys.readouterr().err) == warned and not marker.exists()
