"""Configuration of Gemma 4's text decoder, and its published forms turned into it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thl_engine.config.base import LARGEST_COUNT, require
from thl_engine.config.gemma import FULL, SLIDING, GemmaConfig
from thl_engine.config.published import TEXT, refuse_variants, rope_types, text_part
from thl_engine.errors import ConfigError, shown

_PATTERN = (SLIDING,) * 5 + (FULL,)  # of layers whose types are not given
_LAYERS, _INNER, _KEY_HEADS, _WIDTH, _GLOBAL_WIDTH = 30, 9216, 4, 256, 512  # of a configuration that does not tell
_OF_A_LAYER = ("head_dim", "num_key_value_heads")  # what `per_layer_config` may set


@dataclass(frozen=True)
class Gemma4Config(GemmaConfig):
    """The text decoder of Gemma 4 (Transformers 5.24.0), whose defaults these are; no published size has them all.

    What layers may differ in has an entry for each: intermediate_size, num_key_value_heads, head_dim, layer_types.
    rope_local_base_freq: of layers in windows. partial_rotary_factor: the share of a full layer's head that is rotated.
    attention_k_eq_v: full layers have no value projection, their keys' is used. hidden_size_per_layer_input: 0 where
    layers have no inputs of their own.
    """

    model_type: ClassVar[str] = "gemma4"
    signature: ClassVar[frozenset[str]] = frozenset({"attention_k_eq_v", "use_double_wide_mlp"})
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"attention_dropout", "initializer_range", "num_experts", "top_k_experts", "moe_intermediate_size"}
    )
    training: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})

    vocab_size: int = 262144
    vocab_size_per_layer_input: int = 262144
    hidden_size: int = 2304
    hidden_size_per_layer_input: int = 256
    intermediate_size: tuple[int, ...] = (_INNER,) * _LAYERS
    num_hidden_layers: int = _LAYERS
    num_attention_heads: int = 8
    num_key_value_heads: tuple[int, ...] = (_KEY_HEADS,) * _LAYERS
    head_dim: tuple[int, ...] = ((_WIDTH,) * 5 + (_GLOBAL_WIDTH,)) * 5
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4
    partial_rotary_factor: float = 0.25
    sliding_window: int = 512
    layer_types: tuple[str, ...] = _PATTERN * 5
    num_kv_shared_layers: int = 0
    attention_k_eq_v: bool = False
    final_logit_softcapping: float | None = None

    @classmethod
    def published(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return gemma4_fields(values, where)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_layers("num_key_value_heads", "head_dim")
        name, inputs = "hidden_size_per_layer_input", self.hidden_size_per_layer_input
        require(inputs >= 0, name, inputs, "0 (layers have no inputs of their own) or more")
        require(
            self.layer_types[-1] == FULL, "layer_types", self.layer_types, f"{FULL!r} in the last entry, as published"
        )
        share = self.partial_rotary_factor
        require(0.0 <= share <= 1.0, "partial_rotary_factor", share, "from 0 to 1")
        for i in range(self.num_hidden_layers):
            (heads, width), source = self.heads(i), self.kv_source(i)
            require(
                heads >= 1 and self.num_attention_heads % heads == 0,
                f"num_key_value_heads of layer {i}",
                heads,
                f"a divisor of num_attention_heads ({self.num_attention_heads})",
            )
            even = width >= 2 and width % 2 == 0
            require(even, f"head_dim of layer {i}", width, "even: the rotary embedding pairs features")
            require(
                self.heads(source) == (heads, width),
                f"head_dim and num_key_value_heads of layer {i}",
                (width, heads),
                f"those of layer {source}, whose keys and values it reads",
            )

    def heads(self, i: int) -> tuple[int, int]:
        return self.num_key_value_heads[i], self.head_dim[i]

    def rotation(self, i: int) -> tuple[float, float]:
        base, share = super().rotation(i)
        return base, self.partial_rotary_factor if self.layer_types[i] == FULL else share

    def keys_are_values(self, i: int) -> bool:
        return self.attention_k_eq_v and self.layer_types[i] == FULL


def gemma4_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `Gemma4Config` from a published config.json of Gemma 4, whole or of its text part alone.

    The text part may stand under `text_config`, beside parts for images and sound that are left out. RoPE may stand
    under `rope_parameters` or as fields. What full layers have of their own may stand under `per_layer_config`, or as
    `global_head_dim` and `num_global_key_value_heads`; one number may stand for all layers, and a list, which no other
    field then changes, has one for each. Raises ConfigError for variants that are computed differently.
    """
    values, where = text_part(given, where, "Gemma 4")
    refuse_variants(values, TEXT, where)
    if values.pop("enable_moe_block", None):
        raise ConfigError(f"{where}: enable_moe_block is true; layers with experts are not supported, dense ones are")
    sees = values.pop("use_bidirectional_attention", None)
    if sees not in (None, False, "vision"):  # "vision": among the parts of an image, which are left out
        raise ConfigError(
            f"{where}: use_bidirectional_attention is {shown(sees)}; supported are null, and 'vision' without images"
        )
    values |= _rope_fields(values.pop("rope_parameters", None), f"{where}: rope_parameters")
    if values.get("hidden_size_per_layer_input", 0) is None:
        values["hidden_size_per_layer_input"] = 0
    layers = values.get("num_hidden_layers", _LAYERS)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= LARGEST_COUNT:
        return {"num_hidden_layers": layers}  # refused by its name; without it nothing can be said of the others
    types = values.get("layer_types")
    if types is None:
        types = [FULL if i + 1 == layers else _PATTERN[i % len(_PATTERN)] for i in range(layers)]
        values["layer_types"] = types
    full = [i for i, kind in enumerate(types[:layers]) if kind == FULL] if isinstance(types, (list, tuple)) else []
    _set_heads(values, layers, full, where)
    shared, wide = values.get("num_kv_shared_layers", 0), values.pop("use_double_wide_mlp", False)
    if not isinstance(wide, bool):
        raise ConfigError(f"{where}: use_double_wide_mlp must be true or false, found {shown(wide)}")
    inner = values.setdefault("intermediate_size", _INNER)
    if _whole(inner):
        count = shared if wide and _whole(shared) and 0 <= shared <= layers else 0
        values["intermediate_size"] = [inner] * (layers - count) + [2 * inner] * count
    return values


def _set_heads(values: dict[str, Any], layers: int, full: list[int], where: str) -> None:
    """Replaces what tells of heads by an entry for each layer."""
    overrides = values.pop("per_layer_config", None)
    width, heads = values.pop("global_head_dim", None), values.pop("num_global_key_value_heads", None)
    if overrides is None:
        of_full = {"head_dim": _GLOBAL_WIDTH if width is None else width}
        if heads is not None and values.get("attention_k_eq_v"):
            of_full["num_key_value_heads"] = heads
        overrides = {i: of_full for i in full}
    own = _per_layer(overrides, layers, values, f"{where}: per_layer_config")
    for name, default in (("head_dim", _WIDTH), ("num_key_value_heads", _KEY_HEADS)):
        value = values.setdefault(name, default)
        if not isinstance(value, (list, tuple)):
            values[name] = [own[i].get(name, value) if i in own else value for i in range(layers)]


def _per_layer(given: Any, layers: int, values: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]]:
    """The entries of a `per_layer_config` by the layer's number."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be an object of layers, found {shown(given)}")
    out: dict[int, Mapping[str, Any]] = {}
    for key, fields in given.items():
        number = str(key)
        if not (number.isascii() and number.isdigit() and len(number) <= 5 and int(number) < layers):
            raise ConfigError(f"{where}: {shown(key)} is no layer; there are {layers}, counted from 0")
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{where}: layer {number} must be an object of fields, found {shown(fields)}")
        for name, value in fields.items():
            if name not in _OF_A_LAYER and not (name in values and values[name] == value):
                raise ConfigError(
                    f"{where}: layer {number}: {shown(name)} is {shown(value)}; layers may differ in "
                    f"{' and '.join(_OF_A_LAYER)}"
                )
        out[int(number)] = fields
    return out


def _rope_fields(given: Any, where: str) -> dict[str, Any]:
    """Rotary bases, and the share of full layers' heads that "proportional" rotates."""
    if given is None:
        return {}
    out: dict[str, Any] = {}
    for kind, field, rope in rope_types(given, where):
        rope_type, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
        known = {"rope_type", "rope_theta", *(("partial_rotary_factor",) if rope_type == "proportional" else ())}
        other = next((name for name in rope if name not in known), None)
        if rope_type not in ("default", "proportional"):
            other = "rope_type"
        elif kind == SLIDING and share != 1.0:
            other = "partial_rotary_factor"
        if other is not None:
            raise ConfigError(
                f"{where}: {kind}: {shown(other)} is {shown(rope[other])}; supported are rope_theta, rope_type "
                f"'default', and in {FULL} 'proportional' with partial_rotary_factor"
            )
        if "rope_theta" in rope:
            out[field] = rope["rope_theta"]
        if kind == FULL:
            out["partial_rotary_factor"] = share
    return out


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
