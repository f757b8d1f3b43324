"""`thl run`: text to stdout as it comes, or a file of prompts to a file of answers."""

import json
import os
import stat
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from thl_engine.cli import interrupt
from thl_engine.cli.modes import mode_options
from thl_engine.cli.options import engine_options
from thl_engine.cli.progress import progress_bar
from thl_engine.engine import him_batch
from thl_engine.engine.answering import chats_by_rules, write
from thl_engine.engine.engine import Engine
from thl_engine.engine.generation import Piece
from thl_engine.engine.written import Written
from thl_engine.errors import ConfigError, TokenizerError, shown
from thl_engine.files import read_text
from thl_engine.models.state import State
from thl_engine.ops import native
from thl_engine.ops.backends import isa, threads
from thl_engine.report.statistics import backend, describe


def run(arguments: Namespace) -> None:
    prompts: list[str | list[int]] = [""]
    if arguments.prompt_ids is not None:
        prompts = [_prompt_ids(given) for given in arguments.prompt_ids]
    elif arguments.input is None:
        prompts = [_prompt(given) for given in arguments.prompt or [None]]
    if len(prompts) > 1 and (arguments.state or arguments.save_state):
        raise ConfigError(f"--state and --save-state go with one prompt, not with {len(prompts)}")
    if not native.available() and arguments.backend != "reference" and not arguments.device.startswith("cuda"):
        print(f"thl: computing with torch, more slowly: {native.reason()}", file=sys.stderr)
    options = {**engine_options(arguments), "batch_size": len(prompts)}
    with Engine.from_pretrained(arguments.model, quantize=arguments.quantize, **options) as engine:
        if arguments.stats:
            print(f"thl: model {engine.model_type}, {backend(engine)}", file=sys.stderr)
        if arguments.input is not None:
            _answer(engine, arguments)
            return
        state, effort = _state(engine, arguments) if len(prompts) == 1 else None, engine.architecture.effort
        names = effort.names(engine.config) if effort and (arguments.stats or arguments.json) else ()
        with engine.trace(*names) if names else nullcontext() as trace:
            written = Written(engine, _stream(engine, prompts, state, arguments), len(prompts))
            _print(written, prompts, arguments.json)
        if arguments.save_state and state is not None:
            written.read_rest(state)
            engine.save_state(state, arguments.save_state)
        worked = effort.summary(trace.values()) if effort and trace and trace.steps else {}
        stats = {**engine.stats(), **written.timing(), **worked, "isa": isa(engine.ops), "threads": threads(engine.ops)}
        if arguments.json:
            found = [
                {
                    "text": "".join(piece.text for piece in of),
                    "ids": [piece.id for piece in of],
                    "logprobs": [piece.logprob for piece in of],
                    "stats": stats,
                }
                for of in written.pieces
            ]
            print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
        if arguments.stats:
            print(describe(stats, effort.rows(stats) if effort and worked else []), file=sys.stderr)


def _state(engine: Engine, arguments: Namespace) -> State:
    """A new state, or the one in a file, in the mode asked for."""
    options = mode_options(engine.model_type, arguments.mode, arguments.max_cycles)
    return engine.load_state(arguments.state, **options) if arguments.state else engine.new_state(**options)


def _answer(engine: Engine, arguments: Namespace) -> None:
    """Answers a file of prompts."""
    started = time.perf_counter()
    with progress_bar("answering", "prompts") as progress:
        count = him_batch.answer_file(
            engine,
            arguments.input,
            arguments.output,
            replace(him_batch.PUBLISHED, **_sampling(arguments)),
            progress=progress,
        )
    print(f"thl: {count} prompts answered in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if arguments.stats:
        print(describe(engine.stats()), file=sys.stderr)
    print(arguments.output)


def _sampling(arguments: Namespace) -> dict[str, Any]:
    """The sampling that was asked for; what is not in it is as usual."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _stream(
    engine: Engine, prompts: list[str | list[int]], state: State | None, arguments: Namespace
) -> Iterator[tuple[int, Piece]]:
    """Pieces of the texts asked for. What --chat and --no-chat would mend is refused in their terms."""
    by_rules = chats_by_rules(engine, arguments.chat)
    if by_rules and len(prompts) > 1:
        raise ConfigError(
            f"{len(prompts)} prompts: an {engine.model_type} model's chat takes one; --no-chat continues several"
        )
    if arguments.chat and not by_rules and engine.tokenizer is None:
        raise TokenizerError("--chat: no tokenizer in or beside the checkpoint; put its tokenizer.json there")
    return write(
        engine,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        chat=arguments.chat,
        condition=arguments.condition,
        stop=[_argument(text) for text in arguments.stop],
        sampling=_sampling(arguments),
        state=state,
        state_options=mode_options(engine.model_type, arguments.mode, arguments.max_cycles),
    )


def _print(written: Written, prompts: list[str | list[int]], silent: bool) -> None:
    """Lets the engine write, printing as it goes unless `silent`."""
    printed = _Printer(prompts) if not silent else None
    try:
        for i, piece in written:
            interrupt.check()
            if printed:
                printed.add(i, piece.text)
    finally:
        if printed and (printed.begun or sys.exc_info()[0] is None):
            printed.finish()


class _Printer:
    """Texts that grow at the same time: the first is printed as it comes, the others behind it when all are complete.

    Each of several stands under its number and its prompt.
    """

    def __init__(self, prompts: list[str | list[int]]) -> None:
        self._names = [f"[{i}] {json.dumps(prompt, ensure_ascii=False)}" for i, prompt in enumerate(prompts, 1)]
        self._texts = [""] * len(prompts)
        self.begun = False  # whether a text has
        if len(prompts) > 1:
            print(self._names[0], flush=True)

    def add(self, i: int, text: str) -> None:
        """More of text i."""
        self.begun = True
        if i:
            self._texts[i] += text
        elif text:
            print(text, end="", flush=True)

    def finish(self) -> None:
        """Prints what is left."""
        print(flush=True)
        for name, text in list(zip(self._names, self._texts, strict=True))[1:]:
            print(f"{name}\n{text}", flush=True)


def _prompt(given: str | None) -> str:
    """The text to continue: as given, or from stdin, or a new line. stdin is not waited for unless piped or asked."""
    if given is not None and given != "-":
        return _argument(given)
    if given is None and not _piped():
        return "\n"
    data = sys.stdin.buffer.read()
    try:
        return data.decode() or ("\n" if given is None else "")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"the prompt on stdin is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from None


def _prompt_ids(given: str) -> list[int]:
    """Token ids between commas or blanks: as given, or from a file or stdin."""
    text = given
    if given == "-":
        text = sys.stdin.buffer.read().decode("ascii", "replace")
    elif given.startswith("@"):
        text = read_text(Path(given[1:]), TokenizerError)
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 19):
            raise TokenizerError(f"--prompt-ids: {shown(word)} is no token id; give whole numbers such as 1,2,3")
    return [int(word) for word in words]


def _argument(text: str) -> str:
    """An argument's text: UTF-8 also where the locale says that arguments are ASCII."""
    try:
        return os.fsencode(text).decode() if any("\udc80" <= char <= "\udcff" for char in text) else text
    except UnicodeDecodeError as error:
        raise TokenizerError(f"the argument {shown(text)} is not UTF-8 text (byte {error.start})") from None


def _piped() -> bool:
    """Whether stdin is a pipe or a file: a terminal, or nothing at all, has no prompt in it."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or replaced by something that is no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
