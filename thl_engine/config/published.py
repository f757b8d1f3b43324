"""Configurations as Hugging Face publishes them, turned into the fields of this package's dataclasses."""

from collections.abc import Iterator, Mapping
from typing import Any

from thl_engine.errors import ConfigError, shown

# model_type of a part that is published by itself -> the architecture that it is.
MODEL_TYPES = {"gemma3n_text": "gemma3n", "gemma4_text": "gemma4"}
# Fields that choose among implementations elsewhere, and the values that mean what is computed here.
_FIXED: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "attn_logit_softcapping": None,
    "rope_scaling": None,
}
_ROPES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
_PER_LAYER = ("intermediate_size", "activation_sparsity_pattern")
_OTHER_PARTS = ("vision_config", "audio_config")


def gemma3n_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `Gemma3nConfig` from a published config.json of Gemma-3n, whole or of its text part alone.

    The text part may stand under `text_config`, beside parts for images and sound that are left out; RoPE bases under
    `rope_parameters` or as fields; one number may stand for all layers. Raises ConfigError for variants that are
    computed differently.
    """
    values, where = text_part(given, where, "Gemma-3n")
    refuse_other_values(values, where)
    ropes = values.pop("rope_parameters", None)
    if ropes is not None:
        values |= _rope_bases(ropes, f"{where}: rope_parameters")
    layers = values.get("num_hidden_layers")
    for name in _PER_LAYER:
        if isinstance(layers, int) and 0 < layers < 10000 and isinstance(values.get(name), (int, float)):
            values[name] = [values[name]] * layers
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
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ConfigError(
            f"{where}: the checkpoint was quantised by another tool (quantization_config: {shown(method)}); "
            "supported are float checkpoints, and those of `thl quantize`, which makes int8 of them"
        )
    values.pop("quantization_config", None)
    return values, where


def refuse_other_values(values: dict[str, Any], where: str) -> None:
    """Takes out the fields that choose among implementations elsewhere. Raises ConfigError unless they choose this."""
    for name, computed in _FIXED.items():
        value = values.pop(name, computed)
        if value != computed:
            raise ConfigError(
                f"{where}: {name} is {shown(value)}; supported is {'null' if computed is None else shown(computed)}, "
                "as in published models"
            )


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
    out = {}
    for kind, field, rope in rope_types(given, where):
        for name, value in rope.items():
            if name == "rope_theta":
                out[field] = value
            elif (name, value) != ("rope_type", "default"):
                raise ConfigError(
                    f"{where}: {kind}: {name} is {shown(value)}; supported are rope_type 'default' and rope_theta"
                )
    return out
