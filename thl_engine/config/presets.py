"""The published sizes, by name."""

from thl_engine.config.base import Config
from thl_engine.config.gemma import FULL, SLIDING
from thl_engine.config.gemma3n import Gemma3nConfig
from thl_engine.config.gemma4 import Gemma4Config
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


def _gemma4(
    hidden: int, inner: int, layers: int, shared: int, key_heads: int, windows: int, *, wide: bool
) -> Gemma4Config:
    """A size of Gemma 4 with a full layer after every so many `windows`; shared layers twice as wide inside if `wide`.

    Hidden size, layers, inner widths, their pattern, head sizes (256, full layers 512), window (512), soft cap (30) and
    vocabulary are those of google/gemma.cpp's pull request 919 (its description of E2B and E4B). E4B's 8 heads, 2
    key/value heads, 18 shared layers, rotary bases and share, and 256 features of a per-layer input are those of
    NVIDIA Megatron-Bridge's documentation (recipes, Gemma 4 E4B). E2B's 8 heads with one key/value head and 20 shared
    layers stand in copies of its published config.json. The context is that of Google's model card (128K). All else is
    Transformers' default. Together they give the card's parameters: E2B 5.1 billion (4.63 here, the rest for images and
    sound), 2.3 without the per-layer table; E4B 7.46 billion here.
    """
    pattern = (SLIDING,) * windows + (FULL,)
    types = tuple(pattern[i % len(pattern)] for i in range(layers))
    return Gemma4Config(
        hidden_size=hidden,
        intermediate_size=(inner,) * (layers - shared) + (2 * inner if wide else inner,) * shared,
        num_hidden_layers=layers,
        num_key_value_heads=(key_heads,) * layers,
        head_dim=tuple(512 if kind == FULL else 256 for kind in types),
        layer_types=types,
        num_kv_shared_layers=shared,
        final_logit_softcapping=30.0,
    )


PRESETS: dict[str, Config] = {
    name: INLConfig(
        d_model=width, num_layers=layers, num_heads=heads, num_iterations_per_layer=steps, feedforward_dim=4 * width
    )
    for name, (width, layers, heads, steps) in _INL_SIZES.items()
} | {
    "gemma3n-e4b": Gemma3nConfig(),
    "hrm_text-1b": HRMTextConfig(),
    "gemma4-e2b": _gemma4(1536, 6144, 35, 20, 1, 4, wide=True),
    "gemma4-e4b": _gemma4(2560, 10240, 42, 18, 2, 5, wide=False),
}


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
