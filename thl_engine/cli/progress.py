"""A progress bar on stderr: a line that is rewritten on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from thl_engine.checkpoint.pack import Progress
from thl_engine.cli import interrupt

LIVE_SECONDS = 0.1  # between rewrites of the line on a terminal
LINE_SECONDS = 10.0  # between lines elsewhere; what takes less is silent there
BAR = 24


@contextmanager
def progress_bar(what: str, unit: str | None = None) -> Iterator[Progress]:
    """Gives a function (done, in all) that shows how far `what` is; the bar is gone at the end.

    What is counted are bytes, or things called `unit`.
    """
    live = sys.stderr.isatty()
    started = time.monotonic()
    shown = started - LIVE_SECONDS if live else started

    def show(done: int, total: int) -> None:
        nonlocal shown
        interrupt.check()
        now = time.monotonic()
        if now - shown < (LIVE_SECONDS if live else LINE_SECONDS):
            return
        shown = now
        share, rate = done / max(total, 1), done / max(now - started, 1e-9)
        left = int((total - done) / max(rate, 1e-9))
        amount = (
            f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate / 1e6:4.0f} MB/s"
            if unit is None
            else f"{done} of {total} {unit}"
        )
        bar = "#" * int(share * BAR)
        print(
            f"{chr(13) if live else ''}{what} [{bar:<{BAR}}] {share:4.0%}  {amount}  {left // 60}:{left % 60:02} left",
            end=" " if live else "\n",
            file=sys.stderr,
            flush=True,
        )

    try:
        yield show
    finally:
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
