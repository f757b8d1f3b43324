"""One frozen dataclass per architecture, with the field names of the published projects.

A configuration travels with its checkpoint. Unknown fields and values that cannot work are refused with the
field's name; nothing is guessed.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, get_args

from thl_engine.errors import ConfigError
from thl_engine.published_config import MODEL_TYPES, gemma3n_fields, hrm_gemma3n_fields

LARGEST_CYCLES = 64  # of hierarchical reasoning; bounds the length of a walk, which lists every revisit
_LARGEST = 1 << 31  # no size field of a real model comes near; keeps products of a few sizes within 64 bits

_PLURALS = {int: "whole numbers", float: "numbers", str: "names"}


def _require(holds: bool, name: str, value: Any, needed: str) -> None:
    if not holds:
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{name} is {shown}; it must be {needed}")


@dataclass(frozen=True)
class THLConfig:
    """Hierarchical recurrent tiers with a slot memory (THL 0.2.0). Sizes are counts of features unless noted."""

    model_type: ClassVar[str] = "thl"
    signature: ClassVar[frozenset[str]] = frozenset({"tier_dims", "tier_timescales"})
    # Published fields that change nothing at inference; accepted so that published files load unchanged.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"pad_token_id", "router_load_balance_lambda", "write_rate", "hidden_dim", "dtype", "device"}
    )

    vocab_size: int = 50257
    embedding_dim: int = 768
    num_tiers: int = 3
    tier_dims: tuple[int, ...] = (768, 768, 768)
    tier_timescales: tuple[int, ...] = (1, 8, 64)
    local_window: int = 64
    memory_slots: int = 1024
    memory_dim: int = 768
    query_dim: int = 64
    value_dim: int = 768
    num_heads: int = 4
    head_dim: int = 64
    read_topk: int = 4
    load_penalty: float = 0.1
    read_ema_decay: float = 0.99
    read_slot_capacity: int | None = None
    write_slots: int = 1
    memory_decay: float = 0.9995
    write_clip_max: float = 1.0
    write_ema_decay: float = 0.99
    novelty_beta: float = 8.0
    novelty_theta: float = 0.3
    stale_weight: float = 1.0
    underuse_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "embedding_dim",
            "num_tiers",
            "memory_slots",
            "memory_dim",
            "query_dim",
            "value_dim",
            "num_heads",
            "head_dim",
            "read_topk",
            "write_slots",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.local_window >= 0, "local_window", self.local_window, "0 or more")
        for name in ("tier_dims", "tier_timescales"):
            values = getattr(self, name)
            _require(len(values) == self.num_tiers, name, values, f"{self.num_tiers} entries (num_tiers)")
            _require(min(values) >= 1, name, values, "entries of at least 1")
        _require(self.tier_timescales[0] == 1, "tier_timescales", self.tier_timescales, "1 for the first tier")
        _require(
            self.value_dim % self.num_heads == 0,
            "value_dim",
            self.value_dim,
            f"a multiple of num_heads ({self.num_heads})",
        )
        for name in ("read_topk", "write_slots"):
            _require(
                getattr(self, name) <= self.memory_slots,
                name,
                getattr(self, name),
                f"at most memory_slots ({self.memory_slots})",
            )
        capacity = self.read_slot_capacity
        _require(capacity is None or capacity >= 1, "read_slot_capacity", capacity, "null or at least 1")
        for name in ("read_ema_decay", "write_ema_decay", "memory_decay"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "between 0 and 1")

    @property
    def state_dim(self) -> int:
        """Features of all tiers together, the width that the output head reads."""
        return sum(self.tier_dims)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        return {
            "model_type": self.model_type,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()},
        }


@dataclass(frozen=True)
class HRMConfig:
    """Two recurrent transformer modules with adaptive halting (HRM-text). `expansion` sets the inner width."""

    model_type: ClassVar[str] = "hrm"
    signature: ClassVar[frozenset[str]] = frozenset({"L_layers", "H_layers", "hidden_size"})
    # The published model reads none of these; the last three say what a checkpoint is to be grown to.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"max_seq_len", "halt_exploration_prob", "forward_dtype", "new_vocab_size", "new_L_layers", "new_H_layers"}
    )

    vocab_size: int = 100
    hidden_size: int = 256
    num_heads: int = 8
    L_layers: int = 3
    H_layers: int = 3
    expansion: float = 2.5
    halt_max_steps: int = 16

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "L_layers", "H_layers", "halt_max_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_heads ({self.num_heads})",
        )
        _require(
            self.head_dim % 2 == 0,
            "hidden_size",
            self.hidden_size,
            f"an even number of features for each of num_heads ({self.num_heads}), not {self.head_dim}: the "
            "rotary embedding pairs them",
        )
        _require(
            self.expansion > 0 and 1 <= self.expansion * self.hidden_size * 2 / 3 < _LARGEST,
            "expansion",
            self.expansion,
            f"large enough for one inner feature of hidden_size ({self.hidden_size}) and no larger than any real model",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Inner features of the feed-forward parts: two thirds of `expansion`, rounded up to a multiple of 256."""
        return 256 * -(-int(self.expansion * self.hidden_size * 2 / 3) // 256)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        return {"model_type": self.model_type, **asdict(self)}


@dataclass(frozen=True)
class INLConfig:
    """Attention plus integrator dynamics (INL-LLM V2 2.0.0). The defaults are the published small size."""

    model_type: ClassVar[str] = "inl"
    signature: ClassVar[frozenset[str]] = frozenset({"d_model", "num_iterations_per_layer"})
    # Dropout and checkpointing act in published training only; the sparsity is accepted there and not used.
    ignored: ClassVar[frozenset[str]] = frozenset({"dropout", "use_gradient_checkpointing", "excitation_sparsity"})

    vocab_size: int = 50000
    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    num_iterations_per_layer: int = 5
    feedforward_dim: int | None = None
    max_seq_len: int = 2048
    use_lowrank_embeddings: bool = True
    lowrank_ratio: float = 0.125
    use_shared_controllers: bool = True
    use_adaptive_stopping: bool = True
    adaptive_convergence_threshold: float = 0.001
    hierarchical_group_size: int = 64

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_iterations_per_layer",
            "max_seq_len",
            "hierarchical_group_size",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        inner = self.feedforward_dim
        _require(inner is None or inner >= 1, "feedforward_dim", inner, "null (four times d_model) or at least 1")
        _require(
            self.d_model % self.num_heads == 0, "d_model", self.d_model, f"a multiple of num_heads ({self.num_heads})"
        )
        _require(0.0 <= self.lowrank_ratio <= 1.0, "lowrank_ratio", self.lowrank_ratio, "between 0 and 1")
        _require(
            self.adaptive_convergence_threshold >= 0.0,
            "adaptive_convergence_threshold",
            self.adaptive_convergence_threshold,
            "0 (never stop early) or more",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.d_model // self.num_heads

    @property
    def inner_size(self) -> int:
        """Inner features of the feed-forward parts."""
        return 4 * self.d_model if self.feedforward_dim is None else self.feedforward_dim

    @property
    def embedding_rank(self) -> int:
        """Features of a low-rank embedding row."""
        return max(64, int(self.d_model * self.lowrank_ratio))

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        return {"model_type": self.model_type, **asdict(self)}


HIM_POSITIONS = 512  # rows of the published position table, whatever max_seq_len is


@dataclass(frozen=True)
class HIMConfig:
    """An encoder with shared memory that answers many positions at once (HIM). Defaults: the 7M model."""

    model_type: ClassVar[str] = "him"
    signature: ClassVar[frozenset[str]] = frozenset({"mem_slots", "reasoning_tokens"})
    ignored: ClassVar[frozenset[str]] = frozenset({"dropout"})  # acts in published training only

    vocab_size: int = 32000
    embed_dim: int = 160
    num_heads: int = 8
    num_kv_heads: int = 2
    num_encoder_layers: int = 10
    dim_feedforward: int = 320
    max_answer_len: int = 64
    mem_slots: int = 16
    mem_rank: int = 16
    reasoning_tokens: int = 64
    max_seq_len: int = HIM_POSITIONS

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_heads",
            "num_kv_heads",
            "num_encoder_layers",
            "dim_feedforward",
            "max_answer_len",
            "mem_slots",
            "mem_rank",
            "reasoning_tokens",
            "max_seq_len",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.embed_dim >= 64 and self.embed_dim % 2 == 0,
            "embed_dim",
            self.embed_dim,
            "even and at least 64, the features that reasoning reads",
        )
        _require(
            self.embed_dim % self.num_heads == 0,
            "embed_dim",
            self.embed_dim,
            f"a multiple of num_heads ({self.num_heads})",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(self.mem_rank <= self.embed_dim, "mem_rank", self.mem_rank, f"at most embed_dim ({self.embed_dim})")
        _require(
            self.max_seq_len <= HIM_POSITIONS,
            "max_seq_len",
            self.max_seq_len,
            f"at most {HIM_POSITIONS}, the positions that the model has",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.embed_dim // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        return {"model_type": self.model_type, **asdict(self)}


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Gemma3nConfig:
    """The text decoder of Gemma-3n (Transformers 5.23.0). The defaults are the published E4B size."""

    model_type: ClassVar[str] = "gemma3n"
    signature: ClassVar[frozenset[str]] = frozenset({"altup_num_inputs", "laurel_rank"})
    # What acts in training alone, and what every published configuration repeats about the program that wrote it.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "altup_coef_clip",
            "altup_lr_multiplier",
            "attention_dropout",
            "initializer_range",
            "query_pre_attn_scalar",
            "architectures",
            "torch_dtype",
            "dtype",
            "transformers_version",
            "use_cache",
            "_name_or_path",
            "auto_map",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "return_dict",
            "output_hidden_states",
            "output_attentions",
            "chunk_size_feed_forward",
            "is_encoder_decoder",
            "id2label",
            "label2id",
            "problem_type",
        }
    )

    vocab_size: int = 262400
    vocab_size_per_layer_input: int = 262144
    hidden_size: int = 2048
    hidden_size_per_layer_input: int = 256
    intermediate_size: tuple[int, ...] = (16384,) * 35
    num_hidden_layers: int = 35
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 256
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6  # of the layers with full attention
    rope_local_base_freq: float = 1e4  # of those with a sliding window
    sliding_window: int = 512
    layer_types: tuple[str, ...] = ((SLIDING,) * 4 + (FULL,)) * 7
    num_kv_shared_layers: int = 15
    final_logit_softcapping: float | None = 30.0
    altup_num_inputs: int = 4
    altup_active_idx: int = 0
    altup_correct_scale: bool = True
    laurel_rank: int = 64
    activation_sparsity_pattern: tuple[float, ...] = (0.95,) * 10 + (0.0,) * 25

    published: ClassVar[Any] = staticmethod(gemma3n_fields)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "vocab_size_per_layer_input",
            "hidden_size",
            "hidden_size_per_layer_input",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
            "altup_num_inputs",
            "laurel_rank",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"a multiple of num_key_value_heads ({self.num_key_value_heads})",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: the rotary embedding pairs features")
        for name in ("intermediate_size", "layer_types", "activation_sparsity_pattern"):
            values = getattr(self, name)
            _require(
                len(values) == self.num_hidden_layers,
                name,
                values,
                f"{self.num_hidden_layers} entries (num_hidden_layers)",
            )
        _require(min(self.intermediate_size) >= 1, "intermediate_size", self.intermediate_size, "entries of at least 1")
        _require(
            set(self.layer_types) <= {SLIDING, FULL},
            "layer_types",
            self.layer_types,
            f"entries of {SLIDING!r} or {FULL!r}",
        )
        _require(
            all(0.0 <= share < 1.0 for share in self.activation_sparsity_pattern),
            "activation_sparsity_pattern",
            self.activation_sparsity_pattern,
            "entries of at least 0 and less than 1",
        )
        _require(self.altup_num_inputs <= 64, "altup_num_inputs", self.altup_num_inputs, "at most 64")
        _require(
            0 <= self.altup_active_idx < self.altup_num_inputs,
            "altup_active_idx",
            self.altup_active_idx,
            f"one of the altup_num_inputs ({self.altup_num_inputs}) inputs, counted from 0",
        )
        _require(self.rms_norm_eps >= 0.0, "rms_norm_eps", self.rms_norm_eps, "0 or more")
        for name in ("rope_theta", "rope_local_base_freq"):
            _require(getattr(self, name) > 0.0, name, getattr(self, name), "more than 0")
        cap = self.final_logit_softcapping
        _require(cap is None or cap > 0.0, "final_logit_softcapping", cap, "null (no capping) or more than 0")
        own = self.num_hidden_layers - self.num_kv_shared_layers
        _require(
            0 <= self.num_kv_shared_layers and own >= 1 and set(self.layer_types[own:]) <= set(self.layer_types[:own]),
            "num_kv_shared_layers",
            self.num_kv_shared_layers,
            "0 or more, with a layer of each shared type before the shared layers",
        )

    def kv_source(self, i: int) -> int:
        """The layer whose keys and values layer `i` reads: itself, or the last one of its type that has its own."""
        own = self.num_hidden_layers - self.num_kv_shared_layers
        return i if i < own else max(j for j in range(own) if self.layer_types[j] == self.layer_types[i])

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        return {
            "model_type": self.model_type,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()},
        }


@dataclass(frozen=True)
class ReasoningConfig:
    """What HRM-Gemma adds to its base: two low-rank adapters, and two recurrent states of each position.

    L_size, H_size: features of the states. cycles, L_steps: H updates of a token, and L updates of each cycle, at
    most. L_threshold: L updates end early where the state's change has a smaller Euclidean norm. L_rank, L_alpha: the
    adapter of q, k and v; H_rank, H_alpha: that of gate, up and down.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()

    L_size: int = 2048
    H_size: int = 4096
    cycles: int = 4
    L_steps: int = 8
    L_threshold: float = 0.01
    L_rank: int = 32
    L_alpha: float = 16.0
    H_rank: int = 64
    H_alpha: float = 32.0

    def __post_init__(self) -> None:
        for name in ("L_size", "H_size", "L_rank", "H_rank"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("cycles", "L_steps"):
            _require(
                1 <= getattr(self, name) <= LARGEST_CYCLES, name, getattr(self, name), f"from 1 to {LARGEST_CYCLES}"
            )
        _require(self.L_threshold >= 0.0, "L_threshold", self.L_threshold, "0 (never stop early) or more")
        for name in ("L_alpha", "H_alpha"):
            _require(getattr(self, name) > 0.0, name, getattr(self, name), "more than 0")


@dataclass(frozen=True)
class HRMGemma3nConfig(Gemma3nConfig):
    """HRM's reasoning as adapters on Gemma-3n: the base's fields, and `hrm`."""

    model_type: ClassVar[str] = "hrm_gemma3n"
    signature: ClassVar[frozenset[str]] = Gemma3nConfig.signature | {"hrm"}
    ignored: ClassVar[frozenset[str]] = Gemma3nConfig.ignored | {"base_model"}  # where a folder's base lies

    hrm: ReasoningConfig = field(default_factory=ReasoningConfig)

    published: ClassVar[Any] = staticmethod(hrm_gemma3n_fields)


CONFIGS: dict[str, type] = {
    cls.model_type: cls for cls in (THLConfig, HRMConfig, INLConfig, HIMConfig, Gemma3nConfig, HRMGemma3nConfig)
}

# The published sizes of INL-LLM V2: d_model, layers, heads, iterations; the feed-forward width is four times d_model.
_INL_SIZES = {
    "inl-small": (512, 6, 8, 5),
    "inl-medium": (768, 12, 12, 7),
    "inl-5b": (4096, 32, 32, 10),
    "inl-10b": (5120, 40, 40, 12),
}
PRESETS: dict[str, Any] = {
    name: INLConfig(
        d_model=width, num_layers=layers, num_heads=heads, num_iterations_per_layer=steps, feedforward_dim=4 * width
    )
    for name, (width, layers, heads, steps) in _INL_SIZES.items()
} | {"gemma3n-e4b": Gemma3nConfig()}


def named_config(name: str, model_type: str | None = None) -> Any:
    """A published size by its name, with or without the architecture's in front: "inl-small", or "small" of "inl".

    Raises ConfigError that lists the names.
    """
    found = PRESETS.get(name, PRESETS.get(f"{model_type}-{name}"))
    if found is None:
        raise ConfigError(f"config {name!r}: no such file and no published size; sizes: {', '.join(PRESETS)}")
    if model_type not in (None, found.model_type):
        raise ConfigError(f"config {name} is a size of {found.model_type}, not of {model_type}")
    return found


def parse_config(given: Mapping[str, Any], model_type: str | None = None, where: str = "config") -> Any:
    """Checks a configuration read from JSON and returns its dataclass.

    `model_type` overrides the field of that name; without either, the architecture is the one whose defining
    fields are present. Raises ConfigError that names the field, what was found and what would work.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a JSON object of fields, found {type(given).__name__}")
    values = dict(given)
    stated = values.pop("model_type", None)
    if stated is not None and not isinstance(stated, str):
        raise ConfigError(f"{where}: model_type must be a name, found {stated!r}")
    stated = MODEL_TYPES.get(stated, stated)
    if model_type is not None and stated is not None and stated != model_type:
        raise ConfigError(f"{where}: model_type is {stated!r}, but {model_type!r} was asked for")
    name = model_type or stated or _recognise(values, where)
    if name not in CONFIGS:
        raise ConfigError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(CONFIGS)}")
    cls = CONFIGS[name]
    if hasattr(cls, "published"):
        values = cls.published(values, where)
    return _build(cls, values, where, f"model_type {name!r}")


def _build(cls: type, values: Mapping[str, Any], where: str, what: str) -> Any:
    """An instance of the dataclass `cls`, each value checked against its field."""
    known = {field.name: field for field in fields(cls)}
    kept = {}
    for key, value in values.items():
        if key in known:
            kept[key] = _coerce(value, known[key], f"{where}: {key}")
        elif key not in cls.ignored:
            close = difflib.get_close_matches(key, [*known, *cls.ignored], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}: unknown field {key!r} for {what}{hint}")
    try:
        return cls(**kept)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _recognise(values: Mapping[str, Any], where: str) -> str:
    signatures = [cls.signature for cls in CONFIGS.values() if cls.signature <= values.keys()]
    matches = [
        name
        for name, cls in CONFIGS.items()
        if cls.signature in signatures and not any(cls.signature < other for other in signatures)
    ]
    if len(matches) != 1:
        raise ConfigError(
            f"{where}: no model_type given and the fields do not identify one; "
            f'add "model_type": one of {", ".join(CONFIGS)}'
        )
    return matches[0]


def _coerce(value: Any, field: Any, where: str) -> Any:
    """Checks one JSON value against a field's annotation: scalar, `scalar | None`, tuple[scalar, ...], dataclass."""
    kind = field.type
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be an object of fields, found {value!r}")
        return _build(kind, value, where, "this object")
    if type(None) in get_args(kind):
        if value is None:
            return None
        kind = get_args(kind)[0]
    if not get_args(kind):
        return _scalar(value, kind, where)
    kind = get_args(kind)[0]
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{where} must be a list of {_PLURALS[kind]}, found {value!r}")
    return tuple(_scalar(item, kind, f"{where}, entry {i},") for i, item in enumerate(value))


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, found {value!r}")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{where} must be a name, found {value!r}")
        return value
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{where} must be a whole number, found {value!r}")
        if not -_LARGEST < value < _LARGEST:
            raise ConfigError(f"{where} is {value}, beyond any real model")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} must be a number, found {value!r}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f"{where} must be finite, found {value!r}")
    return float(value)
