"""Imports without the garbage collector, in a process of one's own and in somebody else's."""

import subprocess
import sys

import pytest

CODE = """
import gc, sys, weakref
from sweeps import process as imports
class Node: pass
def cycle():
    node = Node(); node.itself = node
    return node
held = cycle()
alive = weakref.ref(held)
if sys.argv[1] == "ours":
    imports.own_this_process()
with imports.gc_paused():
    assert not gc.isenabled()
    import decimal
assert gc.isenabled()
del held
gc.collect()
print(alive() is None, gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(("whose", "said"), [("theirs", "True False"), ("ours", "False True")])
def test_only_a_process_of_ones_own_keeps_what_it_held(whose, said):
    done = subprocess.run([sys.executable, "-c", CODE, whose], capture_output=True, text=True)
    assert done.stdout.strip() == said, done.stderr


def test_the_collector_comes_back_where_an_import_fails():
    code = """
import gc
from sweeps.process import gc_paused
try:
    with gc_paused():
        import no_such_module
except ImportError:
    print(gc.isenabled())
gc.disable()
with gc_paused():
    pass
print(gc.isenabled())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["True", "False"]


def test_what_later_trials_leave_is_collected():
    code = """
import gc, weakref
from sweeps.ray_backend.worker_group import import_for_trials
import_for_trials()
class Node: pass
node = Node(); node.itself = node
alive = weakref.ref(node)
import_for_trials()
del node
gc.collect()
print(alive() is None)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"
