"""The engine: a checkpoint, a budget and a backend brought together, and the token loop over them."""

import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thl_engine import native
from thl_engine.config import parse_config
from thl_engine.errors import BudgetError, CheckpointError, ConfigError, TokenizerError
from thl_engine.memory import available_memory, parse_bytes
from thl_engine.models import architecture
from thl_engine.ops import ReferenceOps, load_ops
from thl_engine.paged_weights import load_vectors, paged_weights
from thl_engine.pager import Pager
from thl_engine.plan import NOMINAL, Bandwidths, PageSchedule, Plan, make_plan, size
from thl_engine.reader import Reader
from thl_engine.sampler import Sampler, Sampling, StopStrings
from thl_engine.spool import spool_store, spool_tensors
from thl_engine.store import Store, open_store
from thl_engine.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer, load_tokenizer

_log = logging.getLogger("thl_engine")
FORWARD_CHUNK = 64  # steps of `forward` whose logits share one pass over the head
WORKSPACE_LOGITS = 2  # copies of the logits alive at once: as computed, and while a token is chosen from them


@dataclass(frozen=True)
class Piece:
    """A generated token: its id, the text that it completes, and its log-probability under the model."""

    id: int
    text: str
    logprob: float


class Trace:
    """Named intermediates of the steps made while it was open: `steps[i][name]` is a copy."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def record(self, name: str, value: Tensor) -> None:
        """Notes a value of the current step."""
        self.steps[-1][name] = value.detach().cpu().clone()


def _computing(method: Callable) -> Callable:
    """Runs a method without gradients and on the engine's device, which triton takes from torch's current one; leaves
    the processors to the backend: after an operation that torch shares among threads, those spin for milliseconds on
    the cores that native kernels need next."""

    @wraps(method)
    def run(self: "Engine", *args: Any, **inputs: Any) -> Any:
        threads = torch.get_num_threads()
        if self.ops.has_threads:
            torch.set_num_threads(1)
        try:
            with torch.no_grad(), torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                return method(self, *args, **inputs)
        finally:
            torch.set_num_threads(threads)

    return run


class Engine:
    """Runs one model. It holds no context: all that a sequence needs is in its state."""

    def __init__(self, store: Store, *, device: str = "auto", backend: str = "auto", stream: bool | str = "auto",
                 memory_budget: str | int | None = None, threads: int | None = None) -> None:
        """Takes over `store`. Options as in `from_pretrained`."""
        set_threads(threads)
        self.device = choose_device(device)
        self.ops = load_ops(backend, self.device.type)
        self.config = parse_config(store.config, store.model_type)
        self.tokenizer = _tokenizer(store, self.config.vocab_size)
        self._model = architecture(store.model_type)
        self._store = store
        schedule, self._plan = divide_memory(store, self.ops, self.device, stream, memory_budget)
        self._schedules: dict[tuple, PageSchedule] = {(): schedule}  # by the options that a state was made with
        self._state_bytes = self._plan.state_bytes
        self._streams = self._plan.streamed_pages > 0

        vectors = load_vectors(store, self.device)
        tables = [page.index for name in self._plan.resident_tables for page in store.tensors[name].pages]
        reader = Reader(store.files, direct=store.descriptor is None or self._streams)
        self._pager = Pager(store, reader, vectors, (*self._plan.pinned, *tables), self._plan.slots,
                            self._plan.slot_bytes, self._plan.horizon, self.device)
        self._weights = paged_weights(store, self._pager, vectors)
        if not self._streams and self._plan.resident_tables:
            self.close()  # all is in memory: nothing needs the file any more
        self._trace: Trace | None = None
        self._tokens = 0
        self._seconds = 0.0

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, device: str = "auto", backend: str = "auto",
                        quantize: str = "auto", stream: bool | str = "auto",
                        memory_budget: str | int | None = None, threads: int | None = None) -> "Engine":
        """Opens a checkpoint: a .safetensors file, or a folder with config.json and *.safetensors.

        device: "auto", "cpu", "cuda", "cuda:N". backend: "auto", "reference" (torch), "native" (C++)
            or "triton" (CUDA).
        quantize: "auto" as stored, "int8", or "none" for float weights. stream: True pages weights by schedule, False
        keeps all resident, "auto" streams if they do not fit. memory_budget: "4GiB", bytes or None; bounds what the
        engine keeps in memory. Raises EngineError with one line that says what to mend.
        """
        store = open_store(path)
        quantized = any(tensor.scales for tensor in store.tensors.values())
        if quantize not in ("auto", "int8", "none"):
            raise ConfigError(f"quantize is {quantize!r}; it must be 'auto', 'int8' or 'none'")
        if quantize == "none" and quantized:
            raise ConfigError(f"{store.path}: is stored as int8; float weights need the checkpoint it was made from")
        if quantize == "int8" and not quantized:
            store = spool_store(store, "int8", in_memory=stream is not True and memory_budget is None)
        return cls(store, device=device, backend=backend, stream=stream, memory_budget=memory_budget, threads=threads)

    @classmethod
    def from_state_dict(cls, model_type: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *,
                        device: str = "auto", backend: str = "auto", quantize: str = "auto",
                        stream: bool | str = "auto", memory_budget: str | int | None = None,
                        threads: int | None = None) -> "Engine":
        """An engine over tensors in memory, by their published names; options as in `from_pretrained`.

        The tensors are copied, to a temporary file where they are to be streamed.
        """
        if quantize not in ("auto", "int8", "none"):
            raise ConfigError(f"quantize is {quantize!r}; it must be 'auto', 'int8' or 'none'")
        store = spool_tensors(model_type, config, tensors, "int8" if quantize == "int8" else "none",
                                   in_memory=stream is not True and memory_budget is None)
        return cls(store, device=device, backend=backend, stream=stream, memory_budget=memory_budget, threads=threads)

    @property
    def model_type(self) -> str:
        """One of the architectures' names."""
        return self._store.model_type

    def new_state(self, batch_size: int = 1, **options: Any) -> Any:
        """The empty state of `batch_size` sequences, with the options that the model has (HRM: `cycles`).

        Raises BudgetError if the memory budget has no room for it.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
        plan = self._plan
        if plan.budget is not None:
            needed = plan.peak_memory_bytes + (batch_size - 1) * self._state_bytes
            if needed > plan.budget:
                state = size(batch_size * self._state_bytes)
                raise BudgetError(f"a state of batch_size {batch_size} takes {state}; with it the memory budget must "
                                  f"be at least {needed} bytes, and is {plan.budget}")
        try:
            return self._model.init_state(self.config, batch_size, self.device, self._weights, **options)
        except TypeError:
            if not options:
                raise
            raise ConfigError(f"new_state: a {self.model_type} model has no option {', '.join(options)}") from None

    @_computing
    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Feeds one token to each sequence of the batch.

        tokens: int64 [B] or [B, 1]. Returns the next token's logits, float32 [B, vocab_size], and the given state,
        which is updated in place; `state.clone()` first keeps a copy.
        """
        started = time.perf_counter()
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] == 1:
            tokens = tokens[:, 0]
        tokens = self._check_tokens(tokens, 1, state.batch_size)
        hidden = self._run(tokens[:, None], state)[-1]
        logits = self._logits(hidden[:, -1])
        self._end(state)
        self._count(tokens.shape[0], started)
        return logits, state

    @_computing
    def prefill(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Feeds int64 [B, T] and returns the logits after the last token only, float32 [B, vocab_size]."""
        started = time.perf_counter()
        tokens = self._check_tokens(tokens, 2, state.batch_size)
        for hidden in self._run(tokens, state):
            last = hidden[:, -1]
        logits = self._logits(last)
        self._end(state)
        self._count(tokens.numel(), started)
        return logits, state

    @_computing
    def forward(self, tokens: Tensor, state: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
        """A whole sequence: int64 [B, T] -> logits float32 [B, T, vocab_size] after every token, and the state.

        `state` defaults to a fresh one. Further inputs by model, INL: attention_mask; HRM: cycles; HIM: mask and
        reconstruction (without which its logits are those of the answer, [B, max_answer_len, vocab_size]).
        """
        started = time.perf_counter()
        if state is None:
            state = self.new_state(tokens.shape[0] if isinstance(tokens, Tensor) and tokens.dim() == 2
                                   and tokens.shape[0] else 1)
        whole = hasattr(self._model, "forward")  # such a model knows which batches its state takes
        tokens = self._check_tokens(tokens, 2, None if whole else state.batch_size)
        if whole:
            logits = self._forward_whole(tokens, state, inputs)
        elif inputs:
            raise ConfigError(f"forward: a {self.model_type} model has no input {', '.join(inputs)}")
        else:
            logits = self._forward_chained(tokens, state)
        self._count(tokens.numel(), started)
        return logits, state

    def _forward_whole(self, tokens: Tensor, state: Any, inputs: dict[str, Any]) -> Tensor:
        inputs = {**getattr(state, "options", {}), **inputs}
        try:
            walk = self._model.forward_walk(self.config, tuple(tokens.shape), **inputs)
        except TypeError:
            raise ConfigError(f"forward: a {self.model_type} model has no input {', '.join(inputs)}") from None
        names = walk.reads(0)
        self._pager.begin(None, lambda: self._schedules[()].once(names), walk.may_stop)
        logits, following = self._model.forward(self.config, self._weights, self.ops, tokens, state, self._recorder(),
                                                **inputs)
        state.become(following)
        self._pager.end(None)
        return logits

    def _forward_chained(self, tokens: Tensor, state: Any) -> Tensor:
        batch, length = tokens.shape
        out = torch.empty(batch, length, self.config.vocab_size, device=self.device)
        for first in range(0, length, FORWARD_CHUNK):
            hidden = torch.cat(list(self._run(tokens[:, first : first + FORWARD_CHUNK], state)), dim=1)
            count = hidden.shape[1]
            out[:, first : first + count] = self._logits(hidden.flatten(0, 1)).view(batch, count, -1)
            self._end(state)
        return out

    def _run(self, tokens: Tensor, state: Any) -> list[Tensor]:
        """Feeds [B, n] in as many passes as the model needs; the hidden states of each. Logits are to follow."""
        size = self._model.chunk(self.config)
        passes = -(-tokens.shape[1] // size)
        schedule, t = self._schedule(state), self._starts_at(state, tokens.shape[1])
        if passes == 1:
            self._pager.begin(self._key(state, t), lambda: schedule.decode(t), schedule.may_stop)
        else:
            self._pager.begin(("prompt", t, passes), lambda: schedule.prompt(t, passes), schedule.may_stop)
        hidden = []
        for first in range(0, tokens.shape[1], size):
            one, following = self._model.advance(self.config, self._weights, self.ops, tokens[:, first : first + size],
                                                 state, self._recorder())
            state.become(following)  # ops update tensors in place: the caller's object must not lag behind them
            hidden.append(one)
        return hidden

    def _end(self, state: Any) -> None:
        """Announces the next step."""
        self._pager.end(self._key(state, self._starts_at(state, 1)))

    def _starts_at(self, state: Any, count: int) -> int:
        """Step of the schedule at which the next `count` tokens begin."""
        starts_at = getattr(self._model, "starts_at", None)
        return state.timestep if starts_at is None else starts_at(self.config, state, count)

    def _schedule(self, state: Any) -> PageSchedule:
        options = getattr(state, "options", {})
        key = tuple(sorted(options.items()))
        if key not in self._schedules:
            walk = self._model.walk(self.config, **options)
            self._schedules[key] = PageSchedule(self._store, walk, self._model.head(self.config))
            self._schedules[key].pin(frozenset(self._plan.pinned))
        return self._schedules[key]

    def _key(self, state: Any, t: int) -> tuple:
        schedule = self._schedule(state)
        return "decode", id(schedule), t % schedule.period

    def _recorder(self) -> Any:
        if self._trace is None:
            return None
        self._trace.steps.append({})
        return self._trace.record

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.logits(self.config, self._weights, self.ops, hidden)
        if self._trace is not None:
            self._trace.record("logits", logits)
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
            raise TokenizerError(f"tokens: id {low if low < 0 else high} is outside the vocabulary of "
                                 f"{self.config.vocab_size}")
        return tokens.to(self.device)

    def _count(self, tokens: int, started: float) -> None:
        self._tokens += tokens
        self._seconds += time.perf_counter() - started

    def generate(self, prompt: str | Sequence[int], *, max_new_tokens: int = 128, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
                 seed: int | None = None, stop: Sequence[str] = (), state: Any = None) -> Iterator[Piece]:
        """Continues a prompt, token by token. Temperature 0 takes the likeliest token.

        `stop` strings end the text before they appear. A `state` carries an earlier context on and follows along: after
        n pieces it has read the prompt and the first n - 1 of them. A character comes with the piece that completes
        it. Joined, the texts are the text of the ids.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, 0 or more")
        sampler = Sampler(Sampling(temperature, top_k, top_p, repetition_penalty, seed))
        tokenizer = self._text_tokenizer() if isinstance(prompt, str) else self.tokenizer
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise TokenizerError("the prompt is empty; give at least one token to start from")
        if state is None:
            state = self.new_state()
        return self._generate(ids, tokenizer, max_new_tokens, sampler, StopStrings(list(stop)), state)

    def _text_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, or bytes as the published THL does without one."""
        if self.tokenizer is not None:
            return self.tokenizer
        try:
            tokenizer = ByteTokenizer(self.config.vocab_size)
        except TokenizerError:
            raise TokenizerError(f"{self._store.path}: no tokenizer in or beside the checkpoint; put its "
                                 "tokenizer.json there, or give the prompt as token ids") from None
        _log.warning("%s: no tokenizer in or beside the checkpoint; text is taken as bytes", self._store.path)
        return tokenizer

    def _generate(self, ids: list[int], tokenizer: Tokenizer | None, count: int, sampler: Sampler,
                  stops: StopStrings, state: Any) -> Iterator[Piece]:
        decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        if decoder is not None:
            for token in ids:  # the text goes on where the prompt ends: spaces and half characters included
                decoder.push(token)
        logits, state = self.prefill(torch.tensor([ids]), state)
        history = list(ids)
        for i in range(count):
            chosen, logprobs = self._sample(sampler, logits[0].cpu(), history)
            token, logprob = int(chosen), float(logprobs)
            history.append(token)
            ends = i == count - 1 or (tokenizer is not None and token == tokenizer.eos_id)
            text, stopped = stops.push(decoder.push(token) if decoder else "")
            if ends and not stopped:
                tail, stopped = stops.push(decoder.flush() if decoder else "")
                text += tail if stopped else tail + stops.flush()
            yield Piece(token, text, logprob)
            if ends or stopped:
                return
            logits, state = self.step(chosen.view(1), state)

    @_computing
    def _sample(self, sampler: Sampler, logits: Tensor, history: Sequence[int]) -> tuple[Tensor, Tensor]:
        return sampler.sample(logits, history)

    def plan(self, bandwidths: Bandwidths = NOMINAL) -> Plan:
        """What is pinned and streamed within the budget, and the tokens/s that the given bandwidths allow."""
        return self._plan.at(bandwidths, self._store, self._schedules[()])

    def stats(self) -> dict[str, Any]:
        """Counters since the engine started; sizes in bytes, times in seconds."""
        return {
            "tokens": self._tokens, "seconds": self._seconds,
            "tokens_per_second": self._tokens / self._seconds if self._seconds else 0.0,
            **asdict(self._pager.traffic), "peak_memory_bytes": self._plan.peak_memory_bytes,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            "memory_budget": self._plan.budget, "backend": self.ops.name, "device": str(self.device),
        }

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Records named intermediates of every step made inside the `with`."""
        self._trace = Trace()
        try:
            yield self._trace
        finally:
            self._trace = None

    def save_state(self, state: Any, path: str | os.PathLike) -> None:
        """Writes a context to a safetensors file; `load_state` continues it bit for bit."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(state.to_dict(), temporary, metadata={"thl_engine.state": self.model_type,
                                                            "thl_engine.config": json.dumps(self.config.to_dict())})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: the state cannot be written: {error}") from None

    def load_state(self, path: str | os.PathLike) -> Any:
        """Reads a context that `save_state` wrote for a model of the same configuration."""
        try:
            return self.state_from_dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable state file: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @_computing
    def state_from_dict(self, values: Mapping[str, Tensor]) -> Any:
        """The state whose `to_dict` gave `values`."""
        return self._model.state_from_dict(self.config, values, self.ops, self.device)

    def close(self) -> None:
        """Ends the reader and gives back temporary files. A streaming engine cannot be used afterwards."""
        self._pager.close()
        self._store.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tokenizer(store: Store, vocab_size: int) -> Tokenizer | None:
    if store.tokenizer_json is not None:
        return load_tokenizer(store.tokenizer_json, vocab_size, str(store.path))
    return None


def divide_memory(store: Store, ops: ReferenceOps, device: torch.device, stream: bool | str = "auto",
                  memory_budget: str | int | None = None) -> tuple[PageSchedule, Plan]:
    """What an engine pins and streams with these options; none of the weights is read."""
    if stream not in (True, False, "auto"):
        raise ConfigError(f"stream is {stream!r}; it must be True, False or 'auto'")
    config, model = parse_config(store.config, store.model_type), architecture(store.model_type)
    schedule = PageSchedule(store, model.walk(config), model.head(config))
    largest = max(page.nbytes // tensor.dtype.itemsize for tensor in store.tensors.values()
                  if tensor.kind == "matrix" for page in tensor.pages)
    reused = model.reused(config) if hasattr(model, "reused") else 0
    workspace = WORKSPACE_LOGITS * 4 * config.vocab_size + ops.scratch_bytes(largest, reused)
    limit = None if memory_budget is None else parse_bytes(memory_budget)
    state_bytes = model.init_state(config, 1, "meta").nbytes

    def plan(limit: int | None, stream: bool) -> Plan:
        return make_plan(store, schedule, budget=limit, stream=stream, state_bytes=state_bytes,
                         workspace_bytes=workspace)

    if stream != "auto":
        return schedule, plan(limit, stream)
    if limit is None:
        limit = available_memory(device)
        whole = plan(None, False)
        return schedule, whole if whole.peak_memory_bytes <= limit else plan(limit, True)
    return schedule, plan(limit, True)


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {name!r} is unknown; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use device cpu")
    return device


def set_threads(threads: int | None) -> None:
    """Threads of the CPU backends; None leaves them as they are."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads is {threads!r}; it must be a whole number of at least 1")
    torch.set_num_threads(threads)
    if native.available():
        native.set_threads(threads)
