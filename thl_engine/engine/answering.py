"""Texts that go on from prompts, or answers to them: what a model writes unless told otherwise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thl_engine.engine import hrm_chat
from thl_engine.engine.engine import Engine
from thl_engine.engine.generation import Piece
from thl_engine.errors import ConfigError, TokenizerError, shown
from thl_engine.models.state import State
from thl_engine.text.conditions import USUAL
from thl_engine.text.sampler import Sampling
from thl_engine.text.tokenizer import Tokenizer

CHOICES = ("temperature", "top_k", "top_p", "repetition_penalty")  # of a chat's author


def chats_by_rules(engine: Engine, chat: bool | None = None) -> bool:
    """Whether prompts are answered by the rules of a published chat (HRM's): unless `chat` is False, where the model
    has one."""
    return engine.architecture.answering == "chat" and chat is not False


def write(
    engine: Engine,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int | None = None,
    chat: bool | None = None,
    condition: str | None = None,
    stop: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    state: State | None = None,
    state_options: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, Piece]]:
    """Pieces of the texts that follow the prompts, each with its prompt's index.

    chat: True answers the prompts, by the checkpoint's chat template or the model's own rules; False continues them;
    None does as the model was published: answers where its chat is the only way in which it writes (HRM). condition:
    tags of the answers that are asked for, between commas, for models that have such (HRM-Text). sampling:
    of temperature, top_k, top_p, repetition_penalty and seed those that are not to be as usual there. One prompt goes
    on in `state`, by default a new one; several take a new state with `state_options`. Raises ConfigError for several
    prompts to a model that chats by its own rules, TokenizerError where there is no template to ask with.
    """
    given = dict(sampling or {})
    if condition is not None and not engine.architecture.conditions:
        raise ConfigError(f"condition {shown(condition)}: {engine.model_type} models have no tags of answers")
    if chats_by_rules(engine, chat):
        if len(prompts) > 1:
            raise ConfigError(f"{len(prompts)} prompts: an {engine.model_type} model's chat takes one")
        pieces = hrm_chat.chat(
            engine,
            prompts[0],
            max_new_tokens=max_new_tokens,
            stop=stop,
            state=state,
            sampling=replace(hrm_chat.SAMPLING, **given),
        )
        return ((0, piece) for piece in pieces)
    starts: list[str | list[int]] = [
        _asked(engine, prompt, state, condition) if chat and isinstance(prompt, str) else prompt for prompt in prompts
    ]
    if chat:
        given = {name: getattr(_chat_sampling(engine), name) for name in CHOICES} | given
    given.update(max_new_tokens=max_new_tokens, stop=stop)
    if len(starts) > 1:
        return engine.generate_batch(starts, state_options=state_options, **given)
    return ((0, piece) for piece in engine.generate(starts[0], state=state, **given))


def _chat_sampling(engine: Engine) -> Sampling:
    """How a chat model's answers are chosen: as its author says, else as chats usually are."""
    return (engine.tokenizer and engine.tokenizer.sampling) or hrm_chat.SAMPLING


def _asked(engine: Engine, text: str, state: State | None, condition: str | None) -> list[int]:
    """The prompt that asks a chat model for an answer to `text`, after what the state has read."""
    if engine.tokenizer is None:
        raise TokenizerError("chat: no tokenizer in or beside the checkpoint; put its tokenizer.json there")
    if engine.architecture.conditions and not engine.tokenizer.has_template:
        return engine.tokenizer.conditioned(text, condition or USUAL)
    values: dict[str, Any] = {} if condition is None else {"condition": condition}
    message = {"role": "user", "content": text}
    if state is None or not state.timestep:
        return engine.tokenizer.chat([message], **values)
    return _next_turn(engine.tokenizer, message, values)


def _next_turn(tokenizer: Tokenizer, message: Mapping[str, str], values: Mapping[str, Any]) -> list[int]:
    """What a template writes behind an answer, which the context holds with the token that ended it, to ask on.

    Found by how it goes on after any answer: what begins a conversation, <bos> or a default system prompt, comes once.
    """
    any_turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    closed = tokenizer.chat(any_turn, add_generation_prompt=False, **values)
    asked, whole = tokenizer.chat(any_turn[:1], **values), tokenizer.chat([*any_turn, message], **values)
    if whole[: len(closed)] == closed and closed[: len(asked)] == asked:
        ends = [i for i in range(len(asked), len(closed)) if closed[i] in tokenizer.end_ids]
        return whole[ends[-1] + 1 if ends else len(closed) :]
    ids = tokenizer.chat([message], **values)  # a template that writes earlier turns in another way
    return ids[1:] if ids[:1] == [tokenizer.bos_id] else ids
