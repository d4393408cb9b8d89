"""Ctrl-C and SIGTERM: when they come, when they wait, and what is said."""

import os
import signal

import pytest

from sweeps.cli import app as cli
from sweeps.cli.options import STOPPED
from sweeps.process import install_sigterm_handler, uninterrupted


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which Ray Train replaces, where another test has used it here
    install_sigterm_handler()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_end(number):
    done, before = [], signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        done.append("all of it")
    assert done and signal.getsignal(number) is before


def test_what_went_wrong_is_more_than_that_it_was_stopped():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError
    with uninterrupted():
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("has_results", [False, True])
def test_a_sweep_that_is_stopped_says_so_in_a_line(tmp_path, plan_file, tiny_model, monkeypatch, capsys, number, has_results):
    root = tmp_path / "results"

    def stop(*_, **__):
        if has_results:
            root.mkdir()
        os.kill(os.getpid(), number)

    monkeypatch.setattr("sweeps.run.check_cells", stop)
    assert cli._run(["sweep", str(plan_file(model=tiny_model)), "--serial", "--out", str(root)]) == STOPPED
    where = f" What has finished lies in {root}; the same command goes on from there." if has_results else ""
    assert capsys.readouterr().err.strip() == f"llmft: stopped.{where}"
    assert root.exists() == has_results
