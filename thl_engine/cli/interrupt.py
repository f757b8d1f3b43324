"""Ctrl-C that is never lost.

Python drops an exception that is raised inside a destructor or a callback from C, KeyboardInterrupt too.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it
_asked = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Remembers a SIGINT, for `check`, besides raising KeyboardInterrupt at once; it stays ignored where it was."""
    global _asked
    previous, report = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if previous is not signal.default_int_handler:
        yield
        return

    def quiet(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)

    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = quiet
    try:
        yield
    finally:
        _asked = False
        signal.signal(signal.SIGINT, previous)
        sys.unraisablehook = report


@contextmanager
def held() -> Iterator[None]:
    """Inside of it a SIGINT is remembered alone, and raised at the end: an import that is interrupted within C code
    leaves a library half loaded. A second one ends the process at once."""
    if signal.getsignal(signal.SIGINT) is not _interrupt:
        yield
        return
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _interrupt)
    check()


def check() -> None:
    """Raises KeyboardInterrupt if there was a SIGINT that has ended nothing yet. For loops over tokens and the like."""
    if _asked:
        raise KeyboardInterrupt


def _remember(number: int, frame: object) -> None:
    global _asked
    if _asked:
        os._exit(INTERRUPTED)
    _asked = True


def _interrupt(number: int, frame: object) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
