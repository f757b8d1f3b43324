"""What an engine is told: one frozen record of its options, checked when it is made."""

from dataclasses import dataclass
from typing import Any, Literal

from thl_engine.errors import ConfigError, shown
from thl_engine.memory import parse_bytes
from thl_engine.models.contract import AnyArchitecture

MOST_THREADS = 1024  # that the native backend starts


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine runs a model. Sizes in bytes; `of` takes them as people write them.

    device: "auto", "cpu", "cuda", "cuda:N". backend: "auto", "reference" (torch), "native" (C++) or "triton" (CUDA).
    stream: True pages weights by schedule, False keeps all resident, "auto" streams if they do not fit. memory_budget:
    bounds what the engine keeps in memory, a state of `batch_size` sequences included; None for what is free, or with
    stream=True for the least that runs (the command line's --stream takes up to 4 GiB instead). threads:
    of the CPU backends, None for as many as there are. host_memory: with a CUDA device, how much of what is streamed to
    it stays page-locked in the host's memory; None for half of what is free, 0 for none. verify: "first" compares a
    page with its checksum when it is first read, "always" at every read. Files that change while they are in use are
    refused either way, by identity, size and time of change.

    Of models with a KV cache, context: positions that a sequence may grow to, None for the most the model has.
    kv_cache: "float32" or "int8", with a scale for each row. sliding_window: positions that attention sees; that
    changes the model's results, since tokens further back are no longer seen.

    Raises ConfigError for a value that cannot work.
    """

    device: str = "auto"
    backend: str = "auto"
    stream: bool | Literal["auto"] = "auto"
    memory_budget: int | None = None
    threads: int | None = None
    batch_size: int = 1
    context: int | None = None
    kv_cache: str = "float32"
    sliding_window: int | None = None
    host_memory: int | None = None
    verify: Literal["first", "always"] = "first"

    @classmethod
    def of(
        cls, *, memory_budget: str | int | None = None, host_memory: str | int | None = None, **options: Any
    ) -> "EngineOptions":
        """The options, with sizes such as "4GiB"."""
        return cls(
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            host_memory=None if host_memory is None else 0 if host_memory in (0, "0") else parse_bytes(host_memory),
            **options,
        )

    def __post_init__(self) -> None:
        if self.stream not in (True, False, "auto"):
            raise ConfigError(f"stream is {self.stream!r}; it must be True, False or 'auto'")
        if self.verify not in ("first", "always"):
            raise ConfigError(f"verify is {self.verify!r}; it must be 'first' or 'always'")
        check_count("batch_size", self.batch_size)
        if self.threads is not None:
            check_count("threads", self.threads, MOST_THREADS)

    def for_states(self, architecture: AnyArchitecture) -> dict[str, Any]:
        """Those that go to `init_state`; only what differs from the defaults. Raises ConfigError for one that the
        architecture does not have."""
        kv_cache = None if self.kv_cache == "float32" else self.kv_cache
        given = {"context": self.context, "kv_cache": kv_cache, "sliding_window": self.sliding_window}
        options = {name: value for name, value in given.items() if value is not None}
        for name in sorted(options.keys() - set(architecture.state_options)):
            raise ConfigError(
                f"{name} is {options[name]!r}, but {architecture.model_type} models have no such option; leave it out"
            )
        return options


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Raises ConfigError for what is no whole number of at least 1, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        limits = "of at least 1" if most is None else f"from 1 to {most}"
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number {limits}")
