"""The token loop: prompts in, pieces of text out, for one sequence or several that share each pass over the weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from thl_engine.config import Config
from thl_engine.errors import ConfigError, shown
from thl_engine.models.contract import AnyArchitecture
from thl_engine.models.state import State
from thl_engine.text.sampler import Sampler, StopStrings
from thl_engine.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Piece:
    """A generated token: its id, the text that it completes, and its log-probability under the model."""

    id: int
    text: str
    logprob: float


def prompt_ids(prompt: Any) -> list[int]:
    """A prompt given as token ids: a list, or a tensor or array of one dimension. Raises ConfigError."""
    values: Any = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    ids = list(values) if isinstance(values, Iterable) else [values]
    if not isinstance(prompt, Iterable) or not all(isinstance(token, Integral) for token in ids):
        raise ConfigError(
            f"the prompt is {shown(prompt)}; it must be a text, or token ids as whole numbers in one list"
        )
    return [int(token) for token in ids]


class Steps(Protocol):
    """What an engine does for this loop."""

    def prefill(self, tokens: Tensor, state: State) -> tuple[Tensor, State]: ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]: ...

    def sample(self, sampler: Sampler, logits: Tensor, history: Sequence[int]) -> tuple[Tensor, Tensor]: ...


class Row:
    """One sequence: its prompt, and the text that is made of what follows."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer | None, sampler: Sampler, stops: StopStrings) -> None:
        """`limit` is to follow."""
        self.prompt = prompt
        self.done = True
        self._history = list(prompt)
        self._last = len(prompt)
        self._sampler, self._stops = sampler, stops
        self._end = frozenset() if tokenizer is None else tokenizer.end_ids
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        if self._decoder is not None:
            for token in prompt:  # the text goes on where the prompt ends: spaces and half characters included
                self._decoder.push(token)

    def limit(self, count: int) -> None:
        """Generates `count` tokens at most."""
        self.done = count == 0
        self._last = len(self.prompt) + count

    def choose(self, engine: Steps, logits: Tensor) -> Piece:
        """The next token, chosen from its logits [V]."""
        chosen, logprob = engine.sample(self._sampler, logits, self._history)
        token = int(chosen)
        self._history.append(token)
        ends = len(self._history) == self._last or token in self._end
        text, stopped = self._stops.push(self._decoder.push(token) if self._decoder else "")
        if ends and not stopped:
            tail, stopped = self._stops.push(self._decoder.flush() if self._decoder else "")
            text += tail if stopped else tail + self._stops.flush()
        self.done = ends or stopped
        return Piece(token, text, float(logprob))

    def token(self, position: int) -> int:
        """The token at a position of the sequence, or the last one there is."""
        return self._history[min(position, len(self._history) - 1)]


def together(architecture: AnyArchitecture, config: Config, lengths: Sequence[int]) -> list[list[int]]:
    """Which of the prompts of these lengths can share a state, by their indices."""
    everyone = list(range(len(lengths)))
    if architecture.rows_meet:
        return [[i] for i in everyone]
    if architecture.whole_prompts(config):
        return [[i for i in everyone if lengths[i] == length] for length in dict.fromkeys(lengths)]
    return [everyone]


def generate(engine: Steps, rows: Sequence[Row], state: State) -> Iterator[tuple[int, Piece]]:
    """Continues the rows of a state: (row, piece) in the order in which they come.

    All rows are at the same step at all times, so that clocks stay in phase: what all prompts have is read at once,
    then each step feeds every row the next token of its prompt or its own last one. A row that is done is carried
    along, and what it gives is dropped.
    """
    fed = min(len(row.prompt) for row in rows)
    logits, state = engine.prefill(torch.tensor([row.prompt[:fed] for row in rows]), state)
    while True:
        for i, row in enumerate(rows):
            if not row.done and fed >= len(row.prompt):
                yield i, row.choose(engine, logits[i])
        if all(row.done for row in rows):
            return
        logits, state = engine.step(torch.tensor([row.token(fed) for row in rows]), state)
        fed += 1
