"""The published chat of HRM-text: how a prompt is cut, how tokens are chosen, and when the answer is over."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from thl_engine.engine.engine import Engine
from thl_engine.engine.generation import Piece
from thl_engine.models.state import State
from thl_engine.text.sampler import Sampling, StopStrings
from thl_engine.text.tokenizer import Tokenizer

PROMPT_LIMIT = 60  # tokens of a prompt that are kept, the last ones
EMPTY_PROMPT = (2,)  # <BOS>
END_IDS = (0, 3)  # <PAD>, <EOS>
REPETITION_LIMIT = 10  # repetitions of one token in a row that are still part of an answer
SAMPLING = Sampling(temperature=0.8, top_k=50)


class ChatEnd:
    """Tells when an answer is over. The token that ends it is not part of it.

    A token equal to the one before is counted, any other starts the count anew. The published chat may also stop at
    the end of a line or sentence, but only beyond 1500 tokens or 90 % of the length asked for; that is left out.
    """

    def __init__(self, vocab_size: int, end_ids: Iterable[int] = END_IDS) -> None:
        """vocab_size: ids from there on, which a tokenizer smaller than its model does not define, end the answer."""
        self._vocab_size = vocab_size
        self._end_ids = frozenset(end_ids)
        self._last: int | None = None
        self._repeats = 0

    def reached(self, token: int) -> bool:
        """Whether `token`, the next one chosen, ends the answer."""
        if token in self._end_ids or token >= self._vocab_size:
            return True
        self._repeats = self._repeats + 1 if token == self._last else 0
        self._last = token
        return self._repeats > REPETITION_LIMIT


def chat_prompt(ids: Sequence[int]) -> list[int]:
    """The tokens that a chat starts from: the last 60, or <BOS> where there are none."""
    return list(ids[-PROMPT_LIMIT:]) or list(EMPTY_PROMPT)


def end_ids(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Those of <PAD> and <EOS> that a tokenizer has: under another numbering the same ids stand for text."""
    return tuple(i for i in END_IDS if tokenizer is None or not tokenizer.decode([i]))


def chat(
    engine: Engine,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int | None,
    sampling: Sampling = SAMPLING,
    stop: Sequence[str] = (),
    state: State | None = None,
) -> Iterator[Piece]:
    """The pieces of an answer, as `Engine.generate` gives them, by the rules of the chat.

    When one of its rules ends the answer, `state` has read all of it.
    """
    tokenizer = engine.tokenizer
    if isinstance(prompt, str) and tokenizer is not None:
        prompt = tokenizer.encode(prompt)
    if not isinstance(prompt, str):  # a text without a tokenizer is for the engine to refuse
        prompt = chat_prompt(prompt)
    pieces = engine.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        state=state,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
    )
    end = ChatEnd(engine.config.vocab_size if tokenizer is None else tokenizer.vocab_size, end_ids(tokenizer))
    return _until(end, pieces, StopStrings(list(stop)))


def _until(end: ChatEnd, pieces: Iterator[Piece], stops: StopStrings) -> Iterator[Piece]:
    """Pieces before the end. One whose text may begin a stop string waits until that is decided."""
    waiting: Piece | None = None
    for piece in pieces:
        if end.reached(piece.id):
            break
        if waiting is not None:
            yield waiting
        text, stopped = stops.push(piece.text)
        waiting = replace(piece, text=text)
        if stopped or not stops.holding:
            yield waiting
            waiting = None
        if stopped:
            return
    if waiting is not None:
        yield replace(waiting, text=waiting.text + stops.flush())
