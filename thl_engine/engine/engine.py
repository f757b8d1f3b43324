"""The engine: a checkpoint, a budget and a backend brought together, and the token loop over them."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from thl_engine.checkpoint.spool import spool_store, spool_tensors
from thl_engine.checkpoint.store import Store, open_store
from thl_engine.device.device_memory import DeviceMemory
from thl_engine.engine.generation import Piece, Row, generate, prompt_ids, together
from thl_engine.engine.options import EngineOptions, check_count
from thl_engine.engine.passes import Passes
from thl_engine.engine.prompts import bytes_as_text, check_new_tokens, new_tokens
from thl_engine.engine.resources import (
    Serve,
    check_free,
    choose_device,
    divide_memory,
    for_graphs,
    needs,
    nominal,
    open_pager,
    set_threads,
)
from thl_engine.engine.stored_state import read_state, write_state
from thl_engine.engine.trace import Trace
from thl_engine.errors import BudgetError, CheckpointError, ConfigError, EngineError, TokenizerError, said, shown
from thl_engine.memory import peak_bytes, return_large_blocks, size
from thl_engine.models.state import State
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps
from thl_engine.paging.paged_weights import Pages
from thl_engine.paging.plan import Plan
from thl_engine.paging.prediction import Bandwidths
from thl_engine.paging.transfer import link_bandwidth
from thl_engine.text.sampler import Sampler, Sampling, StopStrings
from thl_engine.text.tokenizer import Tokenizer, load_tokenizer

P = ParamSpec("P")
R = TypeVar("R")


def _computing(method: Callable[Concatenate["Engine", P], R]) -> Callable[Concatenate["Engine", P], R]:
    """Runs a method without gradients and on the engine's device, its memory included; leaves the processors to the
    backend: after an operation that torch shares among threads, those spin for milliseconds on the cores that native
    kernels need next. Without this a step of inl-small takes 5.5 ms in place of 3.7, and a prompt of 64 tokens 33 in
    place of 21 (2-core EPYC). torch's count is the host program's, so it is put back after every call, which takes
    0.2 us; held through `generate`, it would also bind what the program does between two pieces.

    One thread at a time: ops and pager have memory that calls leave to each other. Others wait, each with a state of
    its own, which costs a fraction of a microsecond a call (benchmarks/bench_step.py)."""

    @wraps(method)
    def run(self: "Engine", *args: Any, **inputs: Any) -> Any:
        self._check_usable()
        with self._lock:
            threads = torch.get_num_threads()
            if self.ops.has_threads:
                torch.set_num_threads(1)
            try:
                with torch.no_grad(), self._memory.computing():
                    return method(self, *args, **inputs)
            finally:
                torch.set_num_threads(threads)

    return run


class Engine:
    """Runs one model. It holds no context: all that a sequence needs is in its state."""

    def __init__(self, store: Store, options: EngineOptions | None = None, serve: Serve = open_pager) -> None:
        """Takes over `store`, which is closed with the engine. serve: opens what serves its pages."""
        try:
            self._open(store, options or EngineOptions(), serve)
        except BaseException:
            store.close()  # a spooled copy, say
            raise

    def _open(self, store: Store, options: EngineOptions, serve: Serve) -> None:
        set_threads(options.threads)
        if options.memory_budget is not None:
            return_large_blocks()
        self.device = choose_device(options.device)
        ops = load_ops(options.backend, self.device.type)
        self.config = store.config
        self.tokenizer: Tokenizer | None = None
        if store.tokenizer_json is not None:
            self.tokenizer = load_tokenizer(store.tokenizer_json, self.config.vocab_size, str(store.path))
        self.architecture = store.architecture
        self._store = store
        self._options, self._planned = options.for_states(self.architecture), options.batch_size
        schedule, self._plan = divide_memory(store, ops, self.device, options)
        self._bandwidths = replace(nominal(self.device), link=link_bandwidth(self.device))
        graphs_bytes = for_graphs(ops, self.config, options.batch_size)
        memory = DeviceMemory(self.device, self._plan.budget, graphs_bytes)
        self._passes = Passes(store, ops, self.device, self._plan, schedule, memory, options.verify, serve)
        # An engine that is dropped gives back what one that is closed does.
        self._release = weakref.finalize(self, _release, self._passes.pager, store)
        if not self._plan.streamed_pages and self._plan.resident_tables:
            self._release()  # all is in memory: nothing needs the file any more
        self._lock, self._closed, self._process = threading.RLock(), False, os.getpid()
        self._state_type = type(self.architecture.init_state(self.config, 1, "meta", **self._options))
        self._tokens = 0
        self._seconds = 0.0
        self._besides = 0  # bytes that the longest `forward` took beyond the plan
        self._memory = memory  # last: what lies in it goes first when the engine does

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, quantize: str = "auto", **options: Any) -> "Engine":
        """Opens a checkpoint: a .safetensors file, or a folder with config.json and *.safetensors.

        quantize: "auto" as stored, "int8", or "none" for float weights. options: those of `EngineOptions`: device,
        backend, stream, memory_budget ("4GiB" or bytes), threads, batch_size, context, kv_cache, sliding_window,
        host_memory. Raises EngineError with one line that says what to mend.
        """
        chosen = EngineOptions.of(**options)
        _check_quantize(quantize)
        store = open_store(path)
        quantized = any(tensor.scales for tensor in store.tensors.values())
        if quantize == "none" and quantized:
            raise ConfigError(f"{store.path}: is stored as int8; float weights need the checkpoint it was made from")
        if quantize == "int8" and not quantized:
            store = spool_store(store, "int8", in_memory=_spools_in_memory(chosen))
        return cls(store, chosen)

    @classmethod
    def from_state_dict(
        cls,
        model_type: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        quantize: str = "auto",
        **options: Any,
    ) -> "Engine":
        """An engine over tensors in memory, by their published names; options as in `from_pretrained`.

        The tensors are copied, to a temporary file where they are to be streamed.
        """
        chosen = EngineOptions.of(**options)
        _check_quantize(quantize)
        kind = "int8" if quantize == "int8" else "none"
        return cls(spool_tensors(model_type, config, tensors, kind, in_memory=_spools_in_memory(chosen)), chosen)

    @property
    def ops(self) -> ReferenceOps:
        """What computes; its `name` is the backend's."""
        return self._passes.ops

    @property
    def model_type(self) -> str:
        """One of the architectures' names."""
        return self._store.model_type

    @_computing
    def new_state(self, batch_size: int = 1, **options: Any) -> State:
        """The empty state of `batch_size` sequences, with the options that the model has (HRM: `cycles`).

        Raises BudgetError if the memory budget, or without one the machine, has no room for it at its full context.
        """
        check_count("batch_size", batch_size)
        self._refuse_unknown("new_state", "option", options, self.architecture.state_options)
        self._check_budget(batch_size)
        options = {**self._options, **options}
        try:
            state: State = self.architecture.init_state(
                self.config, batch_size, self.device, self._passes.weights, **options
            )
        except RuntimeError as error:
            raise BudgetError(f"no memory for a state of batch_size {batch_size}: {said(error)}") from None
        state.config = self.config
        return state

    def _refuse_unknown(self, method: str, what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"{method}: {self.model_type} models have no {what} {', '.join(unknown)}")

    def _check_budget(self, batch_size: int) -> None:
        plan = self._plan
        if plan.budget is None and batch_size <= self._planned:  # found to fit when the engine was opened
            return
        own = needs(self._store, self.ops, self.device, batch_size, self._options)
        if plan.budget is None:
            return check_free(own, self.device, batch_size)
        needed = plan.peak_memory_bytes - plan.state_bytes - plan.workspace_bytes - plan.reserve_bytes + own.total
        if needed > plan.budget:
            raise BudgetError(
                f"a state of batch_size {batch_size} takes {size(own.state)}; with it the memory budget "
                f"must be at least {needed} bytes, and is {plan.budget}; an engine that is opened with "
                f"batch_size={batch_size} leaves room for it"
            )

    @_computing
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Feeds one token to each sequence of the batch.

        tokens: int64 [B] or [B, 1]. Returns the next token's logits, float32 [B, vocab_size], and the given state,
        which is updated in place; `state.clone()` first keeps a copy.
        """
        started = time.perf_counter()
        self._check_state(state)
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] == 1:
            tokens = tokens[:, 0]
        tokens = self._check_tokens(tokens, 1, state.batch_size)
        self._check_room(state, 1)
        logits = self._finite(self._passes.step(tokens, state))
        self._count(tokens.shape[0], started)
        return logits, state

    @_computing
    def prefill(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Feeds int64 [B, T] and returns the logits after the last token only, float32 [B, vocab_size]."""
        started = time.perf_counter()
        self._check_state(state)
        tokens = self._check_tokens(tokens, 2, state.batch_size)
        self._check_room(state, tokens.shape[1])
        logits = self._finite(self._passes.prompt(tokens, state))
        self._count(tokens.numel(), started)
        return logits, state

    @_computing
    def forward(self, tokens: Tensor, state: State | None = None, **inputs: Any) -> tuple[Tensor, State]:
        """A whole sequence: int64 [B, T] -> logits float32 [B, T, vocab_size] after every token, and the state.

        `state` defaults to a fresh one. Further inputs by model, INL: attention_mask; HRM: cycles; HIM: mask and
        reconstruction (without which its logits are those of the answer, [B, max_answer_len, vocab_size]).

        The logits are the caller's and lie outside of a memory budget on the CPU; so do activations that cannot be let
        go before the last token is reached (INL: three rows of d_model a token; HRM: positions beyond the window).
        `stats` counts both.
        """
        started = time.perf_counter()
        if state is None:
            state = self.new_state(
                tokens.shape[0] if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[0] else 1
            )
        self._check_state(state)
        whole = self.architecture.forward is not None  # such a model knows which batches its state takes
        self._refuse_unknown("forward", "input", inputs, self.architecture.forward_inputs)
        tokens = self._check_tokens(tokens, 2, None if whole else state.batch_size)
        self._check_room(state, tokens.shape[1])
        logits = self._passes.sequence(tokens, state, inputs)
        self._besides = max(
            self._besides, self.architecture.forward_bytes(self.config, state, tokens.shape[1], logits.nbytes)
        )
        self._count(tokens.numel(), started)
        return logits, state

    def _check_state(self, state: State) -> None:
        if type(state) is self._state_type:
            made_for = state.config
            if made_for is None or made_for is self.config or made_for == self.config:
                return
            found = "one of a model of another configuration"
        else:
            found = f"a {type(state).__name__}"
        raise ConfigError(f"state: expected one of this engine's (`new_state`, `load_state`), found {found}")

    def _finite(self, logits: Tensor) -> Tensor:
        """The logits, unless some are no numbers; a device, which the host would have to wait for, is not asked."""
        if logits.device.type == "cpu" and not torch.isfinite(logits.sum()):
            raise EngineError(
                f"{self._store.path}: the logits are not finite; weights or configuration hold values that no model "
                "computes with"
            )
        return logits

    def _check_tokens(self, tokens: Tensor, rank: int, batch: int | None) -> Tensor:
        form = "[B] or [B, 1]" if rank == 1 else "[B, T] with T of at least 1"
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != rank or not tokens.numel():
            found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ConfigError(f"tokens: expected an int64 tensor {form}, found {found}")
        if batch is not None and tokens.shape[0] != batch:
            raise ConfigError(f"tokens: batch of {tokens.shape[0]}, but the state holds {batch} sequences")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise TokenizerError(
                f"tokens: id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}"
            )
        return tokens

    def _check_room(self, state: State, count: int) -> None:
        """Refuses more tokens than the state has room for, before anything is computed."""
        self.architecture.check_room(self.config, state, count)

    def _new_tokens(self, state: State, length: int, asked: int | None) -> int:
        return new_tokens(partial(self._check_room, state), length, asked)

    def _count(self, tokens: int, started: float) -> None:
        self._tokens += tokens
        self._seconds += time.perf_counter() - started

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        state: State | None = None,
    ) -> Iterator[Piece]:
        """Continues a prompt, token by token. Temperature 0 takes the likeliest token.

        `stop` strings end the text before they appear. A `state` carries an earlier context on and follows along: after
        n pieces it has read the prompt and the first n - 1 of them. A character comes with the piece that completes
        it. Joined, the texts are the text of the ids. Without max_new_tokens 128 are written, or what the context has
        room for; raises ConfigError if it has no room for a number that is given.
        """
        self._check_usable()
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        row = self._row(prompt, max_new_tokens, sampling, stop, begins=state is None or not state.timestep)
        state = self.new_state() if state is None else state
        row.limit(self._new_tokens(state, len(row.prompt), max_new_tokens))
        return (piece for _, piece in generate(self, [row], state))

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        state_options: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[int, Piece]]:
        """Continues several prompts with one pass over the weights for each token of all: (prompt's index, its piece).

        Options as in `generate`, those of `new_state` in `state_options`. Each prompt has a sampler of its own, so its
        text is what it gives alone with the same seed. An engine with a memory budget is opened with
        batch_size=len(prompts), which leaves room for their states. Where the sequences of a batch share their memory
        (HIM), prompts are answered one after the other; where each is read as a whole (HRM-Text), those of one length
        together.
        """
        self._check_usable()
        if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
            raise ConfigError(f"prompts is {shown(prompts)}; it must be a list of at least one prompt")
        sampling, options = Sampling(temperature, top_k, top_p, repetition_penalty, seed), dict(state_options or {})
        rows = [self._row(prompt, max_new_tokens, sampling, stop) for prompt in prompts]
        groups = together(self.architecture, self.config, [len(row.prompt) for row in rows])
        state = self.new_state(len(groups[0]), **options)
        count = self._new_tokens(state, max(len(row.prompt) for row in rows), max_new_tokens)
        for row in rows:
            row.limit(count)
        if len(groups) == 1:
            return generate(self, rows, state)
        return (
            (group[i], piece)
            for group in groups
            for i, piece in generate(self, [rows[i] for i in group], self.new_state(len(group), **options))
        )

    def _row(
        self,
        prompt: str | Sequence[int],
        count: int | None,
        sampling: Sampling,
        stop: Sequence[str],
        begins: bool = True,
    ) -> Row:
        """A prompt with what it takes to continue it. begins: nothing was read before it."""
        check_new_tokens(count)
        sampler, tokenizer = Sampler(sampling), self.tokenizer
        if isinstance(prompt, str):
            tokenizer = tokenizer or bytes_as_text(self.architecture, self.config, str(self._store.path))
            ids = tokenizer.encode(prompt, begins)
        else:
            ids = prompt_ids(prompt)
        if not ids:
            raise TokenizerError("the prompt is empty; give at least one token to start from")
        return Row(ids, tokenizer, sampler, StopStrings(list(stop)))

    @_computing
    def sample(self, sampler: Sampler, logits: Tensor, history: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`Sampler.sample` by the backend, which gets the processors back afterwards."""
        return sampler.sample(logits, history, self.ops.sample)

    def plan(self, bandwidths: Bandwidths | None = None) -> Plan:
        """What is pinned and streamed within the budget, and the tokens/s that the given bandwidths allow.

        Without any, typical ones are taken, but for the link to a CUDA device, which is measured once.
        """
        return self._plan.at(bandwidths or self._bandwidths, self._store, self._passes.schedules[()])

    def stats(self) -> dict[str, Any]:
        """Counters since the engine started; sizes in bytes, times in seconds.

        peak_memory_bytes: what counts against the budget and what `forward` took besides, as planned on the CPU, and as
        seen on CUDA, where it is peak_device_bytes too; device_bytes_besides: all else on the device, the CUDA context
        and other programs; budget_enforced: whether what does not fit is refused.
        """
        return {
            "tokens": self._tokens,
            "seconds": self._seconds,
            "tokens_per_second": self._tokens / self._seconds if self._seconds else 0.0,
            "replayed_steps": 0 if self._passes.graphs is None else self._passes.graphs.replayed,
            **asdict(self._passes.pager.traffic),
            **self._memory.stats(self._plan.peak_memory_bytes + self._besides),
            "peak_rss_bytes": peak_bytes(),
            "memory_budget": self._plan.budget,
            "backend": self.ops.name,
            "device": str(self.device),
            "sliding_window": self._options.get("sliding_window"),
        }

    @contextmanager
    def trace(self, *names: str) -> Iterator[Trace]:
        """Records intermediates of every step made inside the `with`: those named, or all."""
        self._passes.trace = trace = Trace(frozenset(names) or None)
        try:
            yield trace
        finally:
            self._passes.trace = None

    def save_state(self, state: State, path: str | os.PathLike[str]) -> None:
        """Writes a context to a safetensors file; `load_state` continues it bit for bit."""
        self._check_usable()
        self._check_state(state)
        write_state(path, state, self.config)

    def load_state(self, path: str | os.PathLike[str], **options: Any) -> State:
        """Reads a context that `save_state` wrote for a model of the same configuration.

        options: those of `new_state` that the context is to go on with, in place of its own (HRM: `cycles`).
        """
        if options:
            self._refuse_unknown("load_state", "option", options, self.architecture.state_options)
        fields = read_state(path, self.config)
        try:
            state = self.state_from_dict(fields)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if options and self.architecture.with_options is not None:
            state = self.architecture.with_options(self.config, state, **options)
        return state

    @_computing
    def state_from_dict(self, values: Mapping[str, Tensor]) -> State:
        """The state whose `to_dict` gave `values`, in an engine with the same options of the KV cache."""
        state: State = self.architecture.state_from_dict(self.config, values, self.ops, self.device, **self._options)
        self._check_budget(state.batch_size)
        state.config = self.config
        return state

    def close(self) -> None:
        """Ends the reader and gives back temporary files. The engine cannot be used afterwards."""
        if os.getpid() != self._process:  # where another thread may have had the lock
            self._closed = True
            self._release()
            return
        with self._lock:
            self._closed = True
            self._release()

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError("the engine was closed; open another one")
        if os.getpid() != self._process:  # its threads and locks stayed behind
            raise EngineError(
                f"the engine was opened by process {self._process}, and a fork of it cannot use it; open one in the "
                "child, or start the child by spawning"
            )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _release(pager: Pages, store: Store) -> None:
    pager.close()
    store.close()


def _check_quantize(quantize: str) -> None:
    if quantize not in ("auto", "int8", "none"):
        raise ConfigError(f"quantize is {quantize!r}; it must be 'auto', 'int8' or 'none'")


def _spools_in_memory(options: EngineOptions) -> bool:
    """Whether a packed copy lies in memory, outside of the budget, rather than in a temporary file."""
    return options.stream is not True and options.memory_budget is None
