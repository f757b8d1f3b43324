"""The commands `thl` and `thl-run`. They parse, call and print; what they do is elsewhere.

Results go to stdout; progress, notes and statistics to stderr. Exit codes: 0; 1 for an error that the user can
mend, told in one line; 2 for wrong usage; 130 when interrupted. The commands' modules import torch, which takes
more than a second, so they are imported once the options are known to be right.
"""

import argparse
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from thl_engine.cli.interrupt import INTERRUPTED, held, interruptible
from thl_engine.cli.options import parse, parse_run
from thl_engine.errors import EngineError

LONGEST_MESSAGE = 300  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """The command `thl`. Returns the exit code; wrong usage raises SystemExit(2)."""
    _open_streams()
    return _execute(parse(sys.argv[1:] if argv is None else argv))


def run_main(argv: Sequence[str] | None = None) -> int:
    """The command `thl-run`, which is `thl run`."""
    _open_streams()
    return _execute(parse_run(sys.argv[1:] if argv is None else argv))


def _open_streams() -> None:
    """Gives a process that was started with closed streams empty ones: else the first files that it opens take their
    places, and what is meant for stderr goes where stdout is."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def _execute(arguments: argparse.Namespace) -> int:
    try:
        with _notes(), _terminable(), interruptible():
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8")
            _load(arguments.command)(arguments)
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        _discard_output()  # the reader of the output has seen enough
        return 0
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt begins on a line of its own
        return INTERRUPTED
    except EngineError as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"out of memory: {str(error) or 'the system has no more'}{_less(arguments)}")
    except OSError as error:
        return _fail(str(error))
    except RuntimeError as error:
        if "allocate" not in str(error):  # how torch reports that the host or a device has no memory left
            raise
        return _fail(f"out of memory: {str(error).splitlines()[0]}{_less(arguments)}")


def _load(command: str) -> Callable[[argparse.Namespace], None]:
    """The function that carries out a command, named "module.function".

    The garbage collector rests meanwhile: it would walk all that torch is made of again and again, and find nothing.
    What was loaded is then frozen, so that it is not walked at the exit either. Both take a quarter off what `thl
    inspect` costs (0.4 of 1.6 s of CPU on a 2-core EPYC). Where torch is loaded already, a program calls this that goes
    on afterwards, and its collector is left alone.
    """
    module, _, function = command.partition(".")
    rests = gc.isenabled() and "torch" not in sys.modules
    if rests:
        gc.disable()
    try:
        with held():
            found: Callable[[argparse.Namespace], None] = getattr(import_module(f"thl_engine.cli.{module}"), function)
        return found
    finally:
        if rests:
            gc.freeze()
            gc.enable()


def _fail(message: str) -> int:
    _discard_output(keep=True)
    print("thl: error: " + " ".join(message.split()), file=sys.stderr)
    return 1


def _less(arguments: argparse.Namespace) -> str:
    return "; a smaller --memory-budget keeps less in memory" if hasattr(arguments, "memory_budget") else ""


def _discard_output(keep: bool = False) -> None:
    """Leaves nothing in stdout's buffer that Python would fail to write when it exits; writes it first if `keep`."""
    try:
        if keep:
            sys.stdout.flush()
            return
    except OSError:
        pass
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # not a file: nothing is written at exit
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


@contextmanager
def _notes() -> Iterator[None]:
    """Shows what the engine logs, such as a file system that refuses direct reads, each as one line on stderr."""
    logger, handler = logging.getLogger("thl_engine"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("thl: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into an exit that cleans up, temporary files included."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
