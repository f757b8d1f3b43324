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
from typing import Any

import torch

from thl_engine.cli import interrupt
from thl_engine.cli.modes import mode_options
from thl_engine.cli.options import engine_options
from thl_engine.cli.progress import progress_bar
from thl_engine.engine import him_batch, hrm_chat
from thl_engine.engine.engine import Engine, Piece
from thl_engine.errors import ConfigError, TokenizerError
from thl_engine.memory import size
from thl_engine.models.state import State
from thl_engine.ops import native
from thl_engine.report.table import on_device
from thl_engine.text.sampler import Sampling


def run(arguments: Namespace) -> None:
    prompts = [_prompt(given) for given in arguments.prompt or [None]] if arguments.input is None else [""]
    if len(prompts) > 1 and (arguments.state or arguments.save_state):
        raise ConfigError(f"--state and --save-state go with one prompt, not with {len(prompts)}")
    if not native.available() and arguments.backend != "reference" and not arguments.device.startswith("cuda"):
        print(f"thl: computing with torch, more slowly: {native.reason()}", file=sys.stderr)
    options = {**engine_options(arguments), "batch_size": len(prompts)}
    with Engine.from_pretrained(arguments.model, quantize=arguments.quantize, **options) as engine:
        if arguments.stats:
            print(f"thl: model {engine.model_type}, {_backend(engine)}", file=sys.stderr)
        if arguments.input is not None:
            _answer(engine, arguments)
            return
        state, effort = _state(engine, arguments) if len(prompts) == 1 else None, engine.architecture.effort
        names = effort.names(engine.config) if effort and (arguments.stats or arguments.json) else ()
        with engine.trace(*names) if names else nullcontext() as trace:
            pieces, timing = _write(engine, _stream(engine, prompts, state, arguments), prompts, arguments.json)
        unread = timing.pop("unread")
        if arguments.save_state:
            if unread:
                engine.step(torch.tensor([pieces[0][-1].id]), state)
            engine.save_state(state, arguments.save_state)
        worked = effort.summary(trace.values()) if effort and trace and trace.steps else {}
        stats = {**engine.stats(), **timing, **worked, "isa": _isa(engine), "threads": _threads(engine)}
        if arguments.json:
            found = [
                {
                    "text": "".join(piece.text for piece in of),
                    "ids": [piece.id for piece in of],
                    "logprobs": [piece.logprob for piece in of],
                    "stats": stats,
                }
                for of in pieces
            ]
            print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
        if arguments.stats:
            print(_table(stats, effort.rows(stats) if effort and worked else []), file=sys.stderr)


def _state(engine: Engine, arguments: Namespace) -> State:
    """A new state, or the one in a file, in the mode asked for."""
    options = mode_options(engine.model_type, arguments.mode, arguments.max_cycles)
    return engine.load_state(arguments.state, **options) if arguments.state else engine.new_state(**options)


def _answer(engine: Engine, arguments: Namespace) -> None:
    """Answers a file of prompts."""
    started = time.perf_counter()
    with progress_bar("answering", "prompts") as progress:
        count = him_batch.answer_file(
            engine, arguments.input, arguments.output, _sampling(arguments, him_batch.PUBLISHED), progress=progress
        )
    print(f"thl: {count} prompts answered in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if arguments.stats:
        print(_table(engine.stats(), []), file=sys.stderr)
    print(arguments.output)


def _sampling(arguments: Namespace, usual: Sampling) -> Sampling:
    """The sampling asked for; what was not given is as usual."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return replace(usual, **{name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None})


def _stream(
    engine: Engine, prompts: list[str], state: State | None, arguments: Namespace
) -> Iterator[tuple[int, Piece]]:
    """Pieces of the texts that go on from the prompts, or of answers to them where the model chats."""
    stop = [_argument(text) for text in arguments.stop]
    published = engine.architecture.answering == "chat"  # its chat is a way of writing
    if published and arguments.chat is not False:
        if len(prompts) > 1:
            raise ConfigError(
                f"{len(prompts)} prompts: an {engine.model_type} model's chat takes one; --no-chat continues several"
            )
        pieces = hrm_chat.chat(
            engine,
            prompts[0],
            max_new_tokens=arguments.max_new_tokens,
            stop=stop,
            state=state,
            sampling=_sampling(arguments, hrm_chat.SAMPLING),
        )
        return ((0, piece) for piece in pieces)
    how = _sampling(arguments, Sampling())
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": how.temperature,
        "top_k": how.top_k,
        "top_p": how.top_p,
        "repetition_penalty": how.repetition_penalty,
        "seed": how.seed,
        "stop": stop,
    }
    starts: list[str | list[int]] = list(prompts)
    if arguments.chat and not published:
        starts = [_asked(engine, prompt) for prompt in prompts]
    if len(starts) > 1:
        thinking = mode_options(engine.model_type, arguments.mode, arguments.max_cycles)
        return engine.generate_batch(starts, state_options=thinking, **options)
    return ((0, piece) for piece in engine.generate(starts[0], state=state, **options))


def _asked(engine: Engine, text: str) -> list[int]:
    """The prompt that asks a chat model for an answer to `text`."""
    if engine.tokenizer is None:
        raise TokenizerError("--chat: no tokenizer in or beside the checkpoint; put its tokenizer.json there")
    return engine.tokenizer.chat([{"role": "user", "content": text}])


def _write(
    engine: Engine, stream: Iterator[tuple[int, Piece]], prompts: list[str], silent: bool
) -> tuple[list[list[Piece]], dict[str, Any]]:
    """Generates, printing as it goes unless `silent`. Returns the pieces of each prompt and what was timed."""
    before = engine.stats()["tokens"]
    pieces: list[list[Piece]] = [[] for _ in prompts]
    printed = _Printer(prompts) if not silent else None
    started = time.perf_counter()
    read = prompted = None
    try:
        for i, piece in stream:
            interrupt.check()
            if read is None:
                read, prompted = time.perf_counter(), engine.stats()["tokens"] - before
            pieces[i].append(piece)
            if printed:
                printed.add(i, piece.text)
    finally:
        if printed and (any(pieces) or sys.exc_info()[0] is None):
            printed.finish()
    ended = time.perf_counter()
    if read is None:  # nothing was to be written
        read, prompted = ended, engine.stats()["tokens"] - before
    count = sum(map(len, pieces))
    return pieces, {
        "prompt_tokens": prompted,
        "prompt_seconds": read - started,
        "prompt_tokens_per_second": prompted / (read - started),
        # Tokens that were written but not fed back: a model reads what it wrote when it is asked for the next.
        "unread": before + prompted + count - engine.stats()["tokens"],
        "new_tokens": count,
        "decode_seconds": ended - read,
        # The first token comes with the prompt's time, every other one took a step.
        "decode_tokens_per_second": (count - 1) / (ended - read) if count > 1 else None,
    }


class _Printer:
    """Texts that grow at the same time: the first is printed as it comes, the others behind it when all are complete.

    Each of several stands under its number and its prompt.
    """

    def __init__(self, prompts: list[str]) -> None:
        self._names = [f"[{i}] {json.dumps(prompt, ensure_ascii=False)}" for i, prompt in enumerate(prompts, 1)]
        self._texts = [""] * len(prompts)
        if len(prompts) > 1:
            print(self._names[0], flush=True)

    def add(self, i: int, text: str) -> None:
        """More of text i."""
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


def _argument(text: str) -> str:
    """An argument's text: UTF-8 also where the locale says that arguments are ASCII."""
    try:
        return os.fsencode(text).decode() if any("\udc80" <= char <= "\udcff" for char in text) else text
    except UnicodeDecodeError as error:
        raise TokenizerError(f"the argument {ascii(text)} is not UTF-8 text (byte {error.start})") from None


def _piped() -> bool:
    """Whether stdin is a pipe or a file: a terminal, or nothing at all, has no prompt in it."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or replaced by something that is no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _isa(engine: Engine) -> str | None:
    return native.isa() if engine.ops.name == "native" else None


def _threads(engine: Engine) -> int:
    return native.threads() if engine.ops.name == "native" else torch.get_num_threads()


def _backend(engine: Engine) -> str:
    """What computes, for people."""
    isa = _isa(engine)
    return f"backend {engine.ops.name}{f' ({isa})' if isa else ''} on {engine.device}, {_threads(engine)} threads"


def _table(stats: dict[str, Any], effort: list[tuple[str, str]]) -> str:
    """Statistics for people; effort: rows that tell how hard the model worked."""
    uses = stats["page_hits"] + stats["page_misses"]
    budget = "none" if stats["memory_budget"] is None else size(stats["memory_budget"])
    rows = []
    if "new_tokens" in stats:
        speed = stats["decode_tokens_per_second"]
        rows += [
            ("prompt", f"{stats['prompt_tokens']} tokens, {stats['prompt_tokens_per_second']:.1f} tokens/s"),
            ("written", f"{stats['new_tokens']} tokens, {f'{speed:.1f} tokens/s' if speed else 'no step timed'}"),
        ]
    rows += effort
    rows += [
        ("bytes streamed", f"{size(stats['bytes_streamed'])}, and {size(stats['bytes_gathered'])} of table rows"),
        ("waited for pages", f"{stats['stall_seconds']:.2f} s of {stats['seconds']:.2f} s"),
        ("pages", f"{stats['page_hits']} of {uses} uses found in memory, {stats['page_misses']} read"),
        (
            "peak memory",
            f"{size(stats['peak_memory_bytes'])} planned of budget {budget}, "
            f"{size(stats['peak_rss_bytes'])} of the whole process",
        ),
    ]
    if stats["sliding_window"]:
        rows.append(
            ("attention", f"sees the last {stats['sliding_window']} tokens; those further back are no longer seen")
        )
    if stats["peak_device_bytes"]:
        rows.append(("on the device", on_device(stats)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
