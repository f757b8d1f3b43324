"""What a training run shows on stderr."""

import sys
import time

from thl_engine.train.options import rate
from thl_engine.train.resume import Evaluation
from thl_engine.train.run import Run

LIVE_SECONDS = 0.5  # between rewrites of the line on a terminal
LINE_SECONDS = 10.0  # between lines elsewhere
SMOOTHING = 0.98


class Progress:
    """One line that is rewritten on a terminal, elsewhere a line every few seconds."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.live = sys.stderr.isatty()
        self.total, self.weight = 0.0, 0.0  # of the smoothed loss
        self.started, self.first, self.shown = time.monotonic(), run.step, 0.0
        parameters = sum(p.numel() for p in run.model.parameters())
        self._print(
            f"{parameters:,} parameters, {len(run.lanes.tokens):,} tokens to learn from, "
            f"{len(run.held_out):,} held out, {run.step} of {run.options.steps} updates done"
        )

    def update(self, loss: float) -> None:
        """Counts an update; shows the smoothed loss, the speed and the time left."""
        self.total = SMOOTHING * self.total + loss
        self.weight = SMOOTHING * self.weight + 1.0
        now, options, step = time.monotonic(), self.run.options, self.run.step
        if now - self.shown < (LIVE_SECONDS if self.live else LINE_SECONDS) and step < options.steps:
            return
        self.shown = now
        seconds = (now - self.started) / (step - self.first)
        speed = options.batch_size * options.chunk / seconds
        left = int(seconds * (options.steps - step))
        self._print(
            f"update {step}/{options.steps}  loss {self.total / self.weight:.3f}  "
            f"rate {rate(options, step - 1):.1e}  {speed:,.0f} tokens/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            stays=not self.live,
        )

    def evaluated(self, found: Evaluation, kept: bool, text: str) -> None:
        """Shows an evaluation and a sample of text."""
        self._print(
            f"update {self.run.step}: held-out perplexity {found.perplexity:.2f}, "
            f"{found.bits_per_character:.4f} bits per character{', the best so far' if kept else ''}"
        )
        if text:
            self._print("    | " + text.replace("\n", "\n    | "))

    def _print(self, text: str, stays: bool = True) -> None:
        clear = "\r\x1b[K" if self.live else ""
        print(f"{clear}{text}", end="\n" if stays else "", file=sys.stderr, flush=True)
