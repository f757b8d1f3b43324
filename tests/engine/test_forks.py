"""The child of a fork, which has none of its parent's threads: what it is told, and that it ends."""

import subprocess
import sys

import pytest
from conftest import BACKENDS

BEGIN = """
import gc, multiprocessing, os, signal, sys, threading
import torch
from thl_engine import Engine, EngineError
from thl_engine.paging import reader
if sys.argv[2] == "python":
    reader._native = None
engine = Engine.from_pretrained(sys.argv[1], device="cpu", stream=True)
ids = lambda: [piece.id for piece in engine.generate([1, 2], max_new_tokens=3, temperature=0)]
before = ids()
def opened():
    links = []
    for name in os.listdir("/proc/self/fd"):
        try: links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError: pass  # the listing's own
    return sys.argv[1] in links
assert opened()
assert engine._passes.pager._reader.implementation == sys.argv[2]
"""
FORK = """
def ends(call):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for ever is ended, which its status tells
        try:
            call()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]
"""
READERS = ["python", *(["native"] if "native" in BACKENDS else [])]


def run(program: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("reader", READERS)
def test_children_end(packed, reader):
    """And their parent goes on. Where a child has dropped or closed the engine its file is closed too."""
    program = """
def leave(): os._exit(0)
def told():
    try: ids()
    except EngineError as error: os._exit(0 if "a fork of it cannot use it" in str(error) else 2)
def drop():
    global engine
    del engine
    gc.collect()
    assert not opened()
def drop_and_leave():
    drop()
    os._exit(0)
def close_twice():
    engine.close()
    engine.close()
    assert not opened()
    os._exit(0)
def open_another():
    global engine
    engine = Engine.from_pretrained(sys.argv[1], device="cpu", stream=True)
    os._exit(0 if ids() == before else 2)
def have_a_child():
    os._exit(ends(drop_and_leave))
print([ends(call) for call in (leave, told, drop_and_leave, close_twice, open_another, have_a_child)])
child = multiprocessing.get_context("fork").Process(target=drop)
child.start()
child.join()
print(child.exitcode, ids() == before)
for work in (None, drop):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        work and work()
        sys.exit(0)
    print(os.waitpid(child, 0)[1], ids() == before)
"""
    told, *others = run(BEGIN + FORK + program, packed, reader).splitlines()
    assert told == str([0] * 6) and others == ["0 True"] * 3


@pytest.mark.parametrize("reader", READERS)
def test_children_end_whatever_the_engine_is_doing(packed, reader):
    """Its threads have its locks and reads under way when they are left behind."""
    program = """
over = False
def work():
    while not over: ids()
thread = threading.Thread(target=work)
thread.start()
ended = set()
for how in range(12):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        engine.close() if how % 2 else sys.exit(0)
        os._exit(0)
    ended.add(os.waitpid(child, 0)[1])
over = True
thread.join()
print(ended, ids() == before)
"""
    assert run(BEGIN + program, packed, reader) == "{0} True\n"


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_is_of_no_use_to_a_child(packed, reader):
    program = """
from thl_engine.paging.reader import Arena, Reader
source, arena = Reader([sys.argv[1]]), Arena(4096)
ticket = source.submit(0, 0, 100, arena, 0)
def told(call, *arguments):
    try: call(*arguments)
    except ValueError as error: return str(error)
def use():
    messages = {told(source.submit, 0, 0, 100, arena, 0), told(source.wait, ticket), told(source.done, ticket),
                told(source.read_now, 0, 0, 100)}
    print(messages, source.inherited, flush=True)
    source.close()
    source.close()
    os._exit(0)
"""
    told, ended = run(BEGIN + FORK + program + "print(ends(use))", packed, reader).splitlines()
    assert told == "{'the reader was opened by a process that this one is a fork of'} True" and ended == "0"
