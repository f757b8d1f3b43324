"""The published sizes, by name."""

from thl_engine.config.base import Config
from thl_engine.config.gemma3n import Gemma3nConfig
from thl_engine.config.hrm_text import HRMTextConfig
from thl_engine.config.inl import INLConfig
from thl_engine.errors import ConfigError

# The published sizes of INL-LLM V2: d_model, layers, heads, iterations; the feed-forward width is four times d_model.
_INL_SIZES = {
    "inl-small": (512, 6, 8, 5),
    "inl-medium": (768, 12, 12, 7),
    "inl-5b": (4096, 32, 32, 10),
    "inl-10b": (5120, 40, 40, 12),
}
PRESETS: dict[str, Config] = {
    name: INLConfig(
        d_model=width, num_layers=layers, num_heads=heads, num_iterations_per_layer=steps, feedforward_dim=4 * width
    )
    for name, (width, layers, heads, steps) in _INL_SIZES.items()
} | {"gemma3n-e4b": Gemma3nConfig(), "hrm_text-1b": HRMTextConfig()}


def named_config(name: str, model_type: str | None = None) -> Config:
    """A published size by its name, with or without the architecture's in front: "inl-small", or "small" of "inl".

    Raises ConfigError that lists the names.
    """
    found = PRESETS.get(name, PRESETS.get(f"{model_type}-{name}"))
    if found is None:
        raise ConfigError(f"config {name!r}: no such file and no published size; sizes: {', '.join(PRESETS)}")
    if model_type not in (None, found.model_type):
        raise ConfigError(f"config {name} is a size of {found.model_type}, not of {model_type}")
    return found
