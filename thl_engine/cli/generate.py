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

from thl_engine import hrm_chat, native
from thl_engine.cli import batch
from thl_engine.cli.effort import effort, has_modes, open_state, traced
from thl_engine.cli.progress import progress_bar
from thl_engine.engine import Engine, Piece
from thl_engine.errors import ConfigError, TokenizerError
from thl_engine.plan import size
from thl_engine.sampler import Sampling


def run(arguments: Namespace) -> None:
    prompt = _prompt(arguments.prompt) if arguments.input is None else ""
    if not native.available() and arguments.backend != "reference":
        print(f"thl: computing with torch, more slowly: {native.reason()}", file=sys.stderr)
    with Engine.from_pretrained(
            arguments.model, device=arguments.device, backend=arguments.backend, quantize=arguments.quantize,
            stream="auto" if arguments.stream is None else arguments.stream,
            memory_budget=arguments.memory_budget, threads=arguments.threads) as engine:
        if arguments.stats:
            print(f"thl: model {engine.model_type}, {_backend(engine)}", file=sys.stderr)
        if arguments.input is not None:
            _answer(engine, arguments)
            return
        state = open_state(engine, arguments.state, arguments.mode)
        names = traced(engine) if arguments.stats or arguments.json else ()
        with engine.trace(*names) if names else nullcontext() as trace:
            pieces, timing = _write(engine, prompt, state, arguments)
        unread = timing.pop("unread")
        if arguments.save_state:
            if unread:
                engine.step(torch.tensor([pieces[-1].id]), state)
            engine.save_state(state, arguments.save_state)
        stats = {**engine.stats(), **timing, **effort(trace), "isa": _isa(engine), "threads": _threads(engine)}
        if arguments.json:
            print(json.dumps({"text": "".join(piece.text for piece in pieces), "ids": [piece.id for piece in pieces],
                              "logprobs": [piece.logprob for piece in pieces], "stats": stats}, ensure_ascii=False))
        if arguments.stats:
            print(_table(stats), file=sys.stderr)


def _answer(engine: Engine, arguments: Namespace) -> None:
    """Answers a file of prompts."""
    started = time.perf_counter()
    with progress_bar("answering", "prompts") as progress:
        count = batch.answer_file(engine, arguments.input, arguments.output, _sampling(arguments, batch.PUBLISHED),
                                  progress=progress)
    print(f"thl: {count} prompts answered in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if arguments.stats:
        print(_table(engine.stats()), file=sys.stderr)
    print(arguments.output)


def _sampling(arguments: Namespace, usual: Sampling) -> Sampling:
    """The sampling asked for; what was not given is as usual."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return replace(usual, **{name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None})


def _stream(engine: Engine, prompt: str, state: Any, arguments: Namespace) -> Iterator[Piece]:
    """Pieces of a chat's answer, where the model chats, or of the text that goes on from the prompt."""
    stop = [_argument(text) for text in arguments.stop]
    chats = has_modes(engine.model_type)
    if arguments.chat and not chats:
        raise ConfigError(f"--chat: {engine.model_type} models have no published chat; hrm models have")
    if chats and arguments.chat is not False:
        return hrm_chat.chat(engine, prompt, max_new_tokens=arguments.max_new_tokens, stop=stop, state=state,
                             sampling=_sampling(arguments, hrm_chat.SAMPLING))
    how = _sampling(arguments, Sampling())
    return engine.generate(prompt, max_new_tokens=arguments.max_new_tokens, temperature=how.temperature,
                           top_k=how.top_k, top_p=how.top_p, repetition_penalty=how.repetition_penalty, seed=how.seed,
                           stop=stop, state=state)


def _write(engine: Engine, prompt: str, state: Any, arguments: Namespace) -> tuple[list[Piece], dict[str, Any]]:
    """Generates, printing as it goes. Returns the pieces and what was timed."""
    before = engine.stats()["tokens"]
    stream = _stream(engine, prompt, state, arguments)
    pieces: list[Piece] = []
    started = time.perf_counter()
    read = prompted = None
    try:
        for piece in stream:
            if read is None:
                read, prompted = time.perf_counter(), engine.stats()["tokens"] - before
            pieces.append(piece)
            if piece.text and not arguments.json:
                print(piece.text, end="", flush=True)
    finally:
        if not arguments.json and (pieces or sys.exc_info()[0] is None):
            print(flush=True)
    ended = time.perf_counter()
    if read is None:  # nothing was to be written
        read, prompted = ended, engine.stats()["tokens"] - before
    return pieces, {
        "prompt_tokens": prompted, "prompt_seconds": read - started,
        "prompt_tokens_per_second": prompted / (read - started),
        # Tokens that were written but not fed back: a model reads what it wrote when it is asked for the next.
        "unread": before + prompted + len(pieces) - engine.stats()["tokens"],
        "new_tokens": len(pieces), "decode_seconds": ended - read,
        # The first token comes with the prompt's time, every other one took a step.
        "decode_tokens_per_second": (len(pieces) - 1) / (ended - read) if len(pieces) > 1 else None,
    }


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
        raise TokenizerError(f"the prompt on stdin is not UTF-8 text (byte {error.start}); "
                             "convert it to UTF-8") from None


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
    return (f"backend {engine.ops.name}{f' ({isa})' if isa else ''} on {engine.device}, "
            f"{_threads(engine)} threads")


def _table(stats: dict[str, Any]) -> str:
    uses = stats["page_hits"] + stats["page_misses"]
    budget = "none" if stats["memory_budget"] is None else size(stats["memory_budget"])
    rows = []
    if "new_tokens" in stats:
        speed = stats["decode_tokens_per_second"]
        rows += [
            ("prompt", f"{stats['prompt_tokens']} tokens, {stats['prompt_tokens_per_second']:.1f} tokens/s"),
            ("written", f"{stats['new_tokens']} tokens, {f'{speed:.1f} tokens/s' if speed else 'no step timed'}"),
        ]
    if "segments_per_token" in stats:
        rows.append(("thinking", f"{stats['segments_per_token']:.2f} segments a token"))
    if "iterations_per_layer" in stats:
        rows.append(("iterations", " ".join(f"{mean:.2f}" for mean in stats["iterations_per_layer"]) + " by layer"))
    rows += [
        ("bytes streamed", f"{size(stats['bytes_streamed'])}, and {size(stats['bytes_gathered'])} of table rows"),
        ("waited for pages", f"{stats['stall_seconds']:.2f} s of {stats['seconds']:.2f} s"),
        ("pages", f"{stats['page_hits']} of {uses} uses found in memory, {stats['page_misses']} read"),
        ("peak memory", f"{size(stats['peak_memory_bytes'])} planned of budget {budget}, "
                        f"{size(stats['peak_rss_bytes'])} of the whole process"),
    ]
    if stats["peak_device_bytes"]:
        rows.append(("on the device", size(stats["peak_device_bytes"])))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
