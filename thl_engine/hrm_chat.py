"""The published chat rules of HRM-text: how a prompt is cut, how a token is chosen, and when the answer ends."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from thl_engine.sampler import Sampler, Sampling

PROMPT_LIMIT = 60  # tokens of a prompt that are kept, the last ones
EMPTY_PROMPT = (2,)  # <BOS>
END_IDS = frozenset({0, 3})  # <PAD>, <EOS>
REPETITION_LIMIT = 10  # repetitions of one token in a row that are still part of an answer
SAMPLING = Sampling(temperature=0.8, top_k=50)


def chat_prompt(ids: Sequence[int]) -> list[int]:
    """The tokens that a chat starts from: the last 60, or <BOS> where there are none."""
    return list(ids[-PROMPT_LIMIT:]) or list(EMPTY_PROMPT)


class ChatEnd:
    """Tells when an answer is over. The token that ends it is not part of it.

    A token that repeats its predecessor is counted, any other starts the count anew. The published chat also stops at
    a paragraph or sentence end, but only beyond 1500 tokens or 90 % of the length asked for; that is left out.
    """

    def __init__(self, vocab_size: int) -> None:
        """vocab_size: ids from there on, which a tokenizer smaller than its model does not define, end the answer."""
        self._vocab_size = vocab_size
        self._last: int | None = None
        self._repeats = 0

    def reached(self, token: int) -> bool:
        """Whether `token`, the next one chosen, ends the answer."""
        if token in END_IDS or token >= self._vocab_size:
            return True
        self._repeats = self._repeats + 1 if token == self._last else 0
        self._last = token
        return self._repeats > REPETITION_LIMIT


def chat(step: Callable[[Tensor], Tensor], prompt: Sequence[int], vocab_size: int, max_new_tokens: int,
         sampling: Sampling = SAMPLING) -> Iterator[int]:
    """The tokens of an answer.

    step: takes the tokens that came since the last call, int64 [1, n], and returns the next one's logits [1, V]:
    an engine's `prefill` or `step` with a state. sampling: as published unless given; temperature 0 is greedy.
    """
    sampler, end = Sampler(sampling), ChatEnd(vocab_size)
    logits = step(torch.tensor([chat_prompt(prompt)]))
    for count in range(1, max_new_tokens + 1):
        token = int(sampler.sample(logits)[0])
        if end.reached(token):
            return
        yield token
        if count < max_new_tokens:
            logits = step(torch.tensor([[token]]))
