"""What a model has written: the pieces of each text, how fast they came, and whether the model has read them all."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from thl_engine.engine.engine import Engine
from thl_engine.engine.generation import Piece
from thl_engine.models.state import State


class Written:
    """Keeps and times the pieces of a stream as they pass: iterate it once, in place of the stream.

    pieces: of each text, in order. The engine does nothing else meanwhile: its own count of tokens tells which were
    read.
    """

    def __init__(self, engine: Engine, stream: Iterator[tuple[int, Piece]], texts: int = 1) -> None:
        """stream: (text's index, piece), as `Engine.generate_batch` gives them; texts: how many there are."""
        self.pieces: list[list[Piece]] = [[] for _ in range(texts)]
        self._engine, self._stream = engine, stream
        self._before = self._tokens()
        self._prompted = 0
        self._started = self._read = self._ended = time.perf_counter()

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        self._started = time.perf_counter()
        first = True
        for i, piece in self._stream:
            if first:
                first = False
                self._prompt_is_read()
            self.pieces[i].append(piece)
            yield i, piece
        if first:  # nothing was to be written
            self._prompt_is_read()
        self._ended = time.perf_counter()

    def timing(self) -> dict[str, Any]:
        """Tokens, seconds and tokens per second of the prompt and of what was written, once the stream has ended.

        decode_tokens_per_second is None where no step was timed.
        """
        prompt, decode, count = self._read - self._started, self._ended - self._read, sum(map(len, self.pieces))
        return {
            "prompt_tokens": self._prompted,
            "prompt_seconds": prompt,
            "prompt_tokens_per_second": self._prompted / prompt if prompt else 0.0,
            "new_tokens": count,
            "decode_seconds": decode,
            # The first token comes with the prompt's time, every other one took a step.
            "decode_tokens_per_second": (count - 1) / decode if count > 1 else None,
        }

    def read_rest(self, state: State) -> None:
        """Lets the state of one text read its last token, if it has not: `generate` reads what it wrote when it is
        asked for the next."""
        written = self.pieces[0]
        if self._before + self._prompted + len(written) > self._tokens():
            self._engine.step(torch.tensor([written[-1].id]), state)

    def _prompt_is_read(self) -> None:
        self._read, self._prompted = time.perf_counter(), self._tokens() - self._before

    def _tokens(self) -> int:
        count: int = self._engine.stats()["tokens"]
        return count
