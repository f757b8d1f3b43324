"""Logits to tokens with an explicit generator, and stop strings.

The work runs on the CPU in float64, or by a backend's own kernel where the logits are: the same logits and seed give
the same tokens on every device. One uniform number is drawn per token and looked up in the cumulative weights of the
tokens that the filters keep, so that a token costs the same number of draws under every setting.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thl_engine.errors import ConfigError, EngineError

# (logits [V], uniform number, temperature, top_k, top_p) -> float64 [2]: token or -1 if a logit is not finite, and its
# log-probability.
Choose = Callable[[torch.Tensor, float, float, int | None, float | None], torch.Tensor]

# Top-p sorts this many of the largest logits first, and all of them only if these do not suffice. Of 262,400
# logits, sorting all takes 26 ms and picking the 1,024 largest 1 ms (torch 2.13, two CPU cores).
_HEAD = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Applied in this order, each to what the one before left.

    repetition_penalty: logits of the tokens among the last `repetition_window` of the history are divided
      by it where positive and multiplied where negative (CTRL, arXiv 1909.05858); 1 = off.
    temperature: logits are divided by it; 0 = always the largest logit, the lowest id among equals.
    top_k: tokens with a logit below the k-th largest are dropped (equals of it stay); None or 0 = off.
    top_p: tokens in descending order, the lower id first among equals, are kept until their probability
      together exceeds top_p; the first always stays; None or 1 = off.
    seed: 0 to 2**63 - 1; None = a new one from the system each time.

    ConfigError for values that cannot work.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    repetition_window: int = 256

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "0 (greedy) or more", lambda x: x >= 0)
        _number("repetition_penalty", self.repetition_penalty, "above 0 (1 = off)", lambda x: x > 0)
        _integer("repetition_window", self.repetition_window, "0 or more", lambda x: x >= 0)
        if self.top_k is not None:
            _integer("top_k", self.top_k, "0 (off) or more", lambda x: x >= 0)
        if self.top_p is not None:
            _number("top_p", self.top_p, "above 0 and at most 1 (off)", lambda x: 0 < x <= 1)
        if self.seed is not None:
            _integer("seed", self.seed, "from 0 to 2**63 - 1", lambda x: 0 <= x < 1 << 63)


def _number(name: str, value: Any, allowed: str, test: Callable[[Any], bool]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < math.inf or not test(value):
        raise ConfigError(f"{name} is {value!r}; it must be a number {allowed}")


def _integer(name: str, value: Any, allowed: str, test: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not test(value):
        raise ConfigError(f"{name} is {value!r}; it must be an integer {allowed}")


class Sampler:
    """Draws tokens. Row b of a batch has its own generator, seeded `seed + b`, so that what one row draws
    does not depend on the others, and a batch of one draws what a single sequence draws.
    """

    def __init__(self, sampling: Sampling, batch: int = 1):
        self.sampling = sampling
        self._generators = [torch.Generator("cpu") for _ in range(batch)]
        for row, generator in enumerate(self._generators):
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed((sampling.seed + row) % (1 << 63))

    def sample(
        self, logits: torch.Tensor, history: Sequence[int] | Sequence[Sequence[int]] = (), choose: Choose | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token for each row.

        logits:  [V] or [B, V], any float dtype and device; not changed.
        history: ids so far, prompt included, oldest first: a sequence of ints for [V], one such sequence
          for each row for [B, V]. Only the repetition penalty reads it; it may be left out.
        choose: chooses on the logits' device, so that of each row only a token and its log-probability leave it.
        Returns ids (int64) and log-probabilities (float32), both on the CPU and shaped [] or [B]. The
        log-probability is the token's under the model itself, the softmax of the logits as given: before
        penalty, temperature and filters.
        EngineError for logits that are NaN or infinite and for shapes or ids that do not fit.
        """
        if logits.dim() not in (1, 2) or logits.shape[-1] == 0 or not logits.is_floating_point():
            raise EngineError(f"logits must be float [V] or [B, V], got {logits.dtype} {[*logits.shape]}")
        rows = logits.detach().to("cpu" if choose is None else logits.device, torch.float32)
        rows = rows[None] if logits.dim() == 1 else rows
        if len(rows) != len(self._generators):
            raise EngineError(f"a sampler for {len(self._generators)} rows was given logits of {len(rows)}")
        histories: Sequence[Any] = [history] if logits.dim() == 1 else history if len(history) else [()] * len(rows)
        if len(histories) != len(rows):
            raise EngineError(f"{len(histories)} histories for {len(rows)} rows of logits; give one for each")
        if choose is not None:
            pairs = [
                self._choose_there(choose, row, seen, generator)
                for row, seen, generator in zip(rows, histories, self._generators, strict=True)
            ]
            ids, found = torch.tensor([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs])
            return ids.reshape(logits.shape[:-1]), found.reshape(logits.shape[:-1])
        _check_finite(rows)
        chosen = torch.tensor(
            [
                self._choose(row, seen, generator)
                for row, seen, generator in zip(rows, histories, self._generators, strict=True)
            ]
        )
        logprobs = rows.gather(1, chosen[:, None])[:, 0] - torch.logsumexp(rows, dim=1)
        return chosen.reshape(logits.shape[:-1]), logprobs.reshape(logits.shape[:-1])

    def _choose_there(
        self, choose: Choose, row: torch.Tensor, history: Sequence[int], generator: torch.Generator
    ) -> tuple[int, float]:
        s = self.sampling
        penalised = self._penalised(row, history)
        uniform = 0.0 if s.temperature == 0 else _draw(generator)
        token, logprob = choose(penalised, uniform, s.temperature, s.top_k, s.top_p).tolist()
        if token < 0:
            _check_finite(row.cpu()[None])
        if penalised is not row:
            logprob = float(row[int(token)] - torch.logsumexp(row, dim=0))
        return int(token), logprob

    def _penalised(self, row: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        s = self.sampling
        if s.repetition_penalty == 1.0 or not s.repetition_window or not len(history):
            return row
        return _penalise(row, history[-s.repetition_window :], s.repetition_penalty)

    def _choose(self, row: torch.Tensor, history: Sequence[int], generator: torch.Generator) -> int:
        s = self.sampling
        row = self._penalised(row, history)
        if s.temperature == 0:
            return int(row.argmax())  # torch returns the first of equal maxima
        ids, values = None, row
        if s.top_k and s.top_k < len(row):
            ids, values = _largest(row, s.top_k)
        weights = _weights(values, values.max(), s.temperature)
        if s.top_p is not None and s.top_p < 1:
            order, weights = _nucleus(values, weights, s.top_p)
            ids = order if ids is None else ids[order]
        cumulative = weights.cumsum(0)
        total = float(cumulative[-1])
        draw = _draw(generator) * total
        # Strictly below the total, so that rounding cannot select a token of weight 0 at the end.
        place = int(torch.searchsorted(cumulative, min(draw, math.nextafter(total, 0.0)), right=True))
        return place if ids is None else int(ids[place])


def _draw(generator: torch.Generator) -> float:
    """Uniform from 0 to 1, 1 excluded."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def _weights(values: torch.Tensor, largest: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp((values - largest)/temperature) in float64: softmax but for its sum, safe at any temperature."""
    return ((values.double() - largest.double()) / temperature).exp_()


def _largest(row: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, ascending, and values of the entries not below the k-th largest. No sort of the row."""
    ids = (row >= row.topk(k).values[-1]).nonzero()[:, 0]
    return ids, row[ids]


def _nucleus(values: torch.Tensor, weights: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and weights, in descending order, of the entries that top-p keeps of `values` [n].

    weights: [n], their softmax but for its sum.
    """
    limit = p * float(weights.sum())
    head = None
    if len(values) > 4 * _HEAD:
        head, values_head = _largest(values, _HEAD)
        if float(weights[head].sum()) > limit * (1 + 1e-9):
            values, weights = values_head, weights[head]
        else:
            head = None  # the head is not enough: sort everything
    order = values.sort(descending=True, stable=True).indices
    weights = weights[order]
    # A token stays if those before it do not exceed the limit; nothing is before the first.
    kept = 1 + int((weights.cumsum(0)[:-1] <= limit).sum())
    order = order[:kept]
    return (order if head is None else head[order]), weights[:kept]


def _penalise(row: torch.Tensor, history: Sequence[int], penalty: float) -> torch.Tensor:
    seen = torch.as_tensor(history, dtype=torch.int64).unique()
    if seen[0] < 0 or seen[-1] >= len(row):
        bad = int(seen[0] if seen[0] < 0 else seen[-1])
        raise EngineError(f"token id {bad} in the history is outside the vocabulary of {len(row)} ids")
    seen = seen.to(row.device)
    values = row[seen]
    changed = torch.where(values > 0, values / penalty, values * penalty)
    bounds = torch.finfo(row.dtype)
    return row.index_put((seen,), changed.clamp(bounds.min, bounds.max))


def _check_finite(rows: torch.Tensor) -> None:
    low, high = torch.aminmax(rows)  # both NaN if any entry is; a quarter of the time of isfinite().all()
    if math.isfinite(low) and math.isfinite(high):
        return
    row, token = (int(i) for i in (~rows.isfinite()).nonzero()[0])
    count = int((~rows.isfinite()).sum())
    raise EngineError(
        f"{count} of {rows.numel()} logits are NaN or infinite, the first in row {row} at token {token} "
        f"({float(rows[row, token])}): the weights or the restored state are damaged"
    )


class StopStrings:
    """Finds stop strings in text that comes in pieces, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back until that is decided. The stop string that
    is complete first counts; of two that end together, the longer. `matched` is the stop string found, or
    None. ConfigError for empty stop strings.
    """

    def __init__(self, stops: Sequence[str]):
        stops = [stops] if isinstance(stops, str) else list(stops)
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"stop string {stop!r} is empty or no text; leave it out")
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is now certain, whether a stop string was found). Text from the stop string on is
        dropped; once one was found, so is all that follows.
        """
        if self.matched is not None:
            return "", True
        text = self._held + text
        # A match begins in what was held or later: anything released before could not begin one.
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start], True
        keep = next(
            (
                n
                for n in range(min(len(text), self._longest - 1), 0, -1)
                if any(stop.startswith(text[-n:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    @property
    def holding(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def flush(self) -> str:
        """The text still held back, at the end of the sequence; "" after a stop string was found."""
        held, self._held = self._held, ""
        return held
