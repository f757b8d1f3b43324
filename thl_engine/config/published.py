"""Configurations as Hugging Face publishes them, turned into the fields of this package's dataclasses."""

from collections.abc import Iterator, Mapping
from typing import Any

from thl_engine.errors import ConfigError, shown

# model_type of a part that is published by itself -> the architecture that it is.
MODEL_TYPES = {"gemma3n_text": "gemma3n", "gemma4_text": "gemma4"}
# Fields of Gemma's text part that choose among implementations elsewhere, with the values that are computed here.
TEXT: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "attn_logit_softcapping": None,
    "rope_scaling": None,
}
_ROPES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
_OTHER_PARTS = ("vision_config", "audio_config")
_PER_LAYER = ("intermediate_size", "activation_sparsity_pattern")


def gemma3n_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `Gemma3nConfig` from a published config.json of Gemma-3n, whole or of its text part alone.

    The text part may stand under `text_config`, beside parts for images and sound that are left out; RoPE bases under
    `rope_parameters` or as fields; one number may stand for all layers. Raises ConfigError for variants that are
    computed differently.
    """
    values, where = text_part(given, where, "Gemma-3n")
    refuse_variants(values, TEXT, where)
    ropes = values.pop("rope_parameters", None)
    if ropes is not None:
        values |= _rope_bases(ropes, f"{where}: rope_parameters")
    layers = values.get("num_hidden_layers")
    for name in _PER_LAYER:
        if isinstance(layers, int) and 0 < layers < 10000 and isinstance(values.get(name), (int, float)):
            values[name] = [values[name]] * layers
    return values


def hrm_text_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `HRMTextConfig` from a published config.json of HRM-Text.

    `num_hidden_layers` are the blocks of a stack, unless `num_layers_per_stack` says those: then they are all passes
    through blocks that a token makes, which follow from the rest. Raises ConfigError for variants that are computed
    differently.
    """
    values = dict(given)
    _refuse_quantization(values.pop("quantization_config", None), where)
    passes = values.pop("num_hidden_layers", None)
    if values.get("num_layers_per_stack") is None:
        values.pop("num_layers_per_stack", None)
        if passes is not None:
            values["num_layers_per_stack"] = passes
    refuse_variants(values, {"hidden_act": "silu", "rope_scaling": None}, where)
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        values["rope_theta"] = _rope_base(rope, f"{where}: rope_parameters", values.get("rope_theta", 1e4))
    if values.get("L_bp_cycles", ()) is None:
        del values["L_bp_cycles"]
    return values


def hrm_gemma3n_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `HRMGemma3nConfig`: those of its base as published, and `hrm`."""
    own = {name: given[name] for name in ("hrm", "base_model") if name in given}
    return {**gemma3n_fields({name: value for name, value in given.items() if name not in own}, where), **own}


def text_part(given: Mapping[str, Any], where: str, family: str) -> tuple[dict[str, Any], str]:
    """The fields of a model's text part, which may stand under `text_config`, and where they stand.

    Parts for images and sound beside it stay among the fields, so that they are said not to be used. Raises
    ConfigError where there is no text part, or where another tool quantised it.
    """
    values = dict(given)
    quantization = values.get("quantization_config")
    nested = values.get("text_config")
    if isinstance(nested, Mapping):
        values = {key: value for key, value in nested.items() if key != "model_type"}
        values |= {name: given[name] for name in _OTHER_PARTS if given.get(name)}
        where = f"{where}: text_config"
        quantization = quantization or values.get("quantization_config")
    elif any(name in values for name in _OTHER_PARTS):
        raise ConfigError(
            f"{where}: found parts for images or sound without a text_config; supported is the text part "
            f"of {family}, alone or beside those"
        )
    _refuse_quantization(quantization, where)
    values.pop("quantization_config", None)
    return values, where


def _refuse_quantization(quantization: Any, where: str) -> None:
    """Raises ConfigError where another tool quantised the checkpoint."""
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ConfigError(
            f"{where}: the checkpoint was quantised by another tool (quantization_config: {shown(method)}); "
            "supported are float checkpoints, and those of `thl quantize`, which makes int8 of them"
        )


def refuse_variants(values: dict[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Takes fields away that choose among implementations; raises ConfigError where they mean another than `fixed`."""
    for name, computed in fixed.items():
        value = values.pop(name, computed)
        if value != computed:
            supported = "null" if computed is None else shown(computed)
            raise ConfigError(f"{where}: {name} is {shown(value)}; supported is {supported}, as in published models")


def _rope_base(rope: Any, where: str, base: Any) -> Any:
    """The base of a rotation of the ordinary kind, `base` where none is given."""
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where} must be an object with rope_theta, found {shown(rope)}")
    for name, value in rope.items():
        if name == "rope_theta":
            base = value
        elif (name, value) != ("rope_type", "default"):
            raise ConfigError(f"{where}: {name} is {shown(value)}; supported are rope_type 'default' and rope_theta")
    return base


def rope_types(given: Any, where: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Of `rope_parameters`: each type of layer, the field of its base, and what is said of it."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be an object with {' and '.join(_ROPES)}, found {shown(given)}")
    for kind, rope in given.items():
        if kind not in _ROPES or not isinstance(rope, Mapping):
            raise ConfigError(
                f"{where}: {shown(kind)} is {shown(rope)}; expected an object for each of {', '.join(_ROPES)}"
            )
        yield kind, _ROPES[kind], rope


def _rope_bases(given: Any, where: str) -> dict[str, Any]:
    bases = {field: _rope_base(rope, f"{where}: {kind}", None) for kind, field, rope in rope_types(given, where)}
    return {field: base for field, base in bases.items() if base is not None}
