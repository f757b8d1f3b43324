"""Configurations at their real sizes, as their authors published them, and tiny ones of the same kind to rehearse."""

from typing import Any, NamedTuple

from thl_engine.config import PRESETS

SPARSE_LAYERS, LAYERS = 10, 35  # of Gemma-3n E4B


class Model(NamedTuple):
    """A model to run: `options` of the engine within the budget, and the tokens that are decoded."""

    model_type: str
    config: dict[str, Any]
    options: dict[str, Any]
    tokens: int


def _thl(width: int, **more: Any) -> dict[str, Any]:
    return {
        "embedding_dim": width,
        "hidden_dim": width,
        "tier_dims": [width] * 3,
        "memory_dim": width,
        "value_dim": width,
        **more,
    }


def _gemma(layers: int, sparse: int, **more: Any) -> dict[str, Any]:
    kinds = [*["sliding_attention"] * 4, "full_attention"]
    return {
        "num_hidden_layers": layers,
        "layer_types": [kinds[i % 5] for i in range(layers)],
        "activation_sparsity_pattern": [0.95] * sparse + [0.0] * (layers - sparse),
        **more,
    }


THL_DEFAULT: dict[str, Any] = _thl(768, vocab_size=50257)
MODELS = {
    "thl-7b": Model("thl", _thl(12288, vocab_size=50257), {}, 256),
    "inl-5b": Model(
        "inl",
        {
            "vocab_size": 50000,
            "d_model": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "num_iterations_per_layer": 10,
            "feedforward_dim": 16384,
            "max_seq_len": 2048,
            "lowrank_ratio": 0.125,
            "adaptive_convergence_threshold": 0.001,
            "hierarchical_group_size": 64,
            "excitation_sparsity": 0.1,
        },
        {"context": 512},
        64,
    ),
    "gemma-e4b": Model(
        "gemma3n",
        _gemma(
            LAYERS,
            SPARSE_LAYERS,
            vocab_size=262400,
            vocab_size_per_layer_input=262144,
            hidden_size=2048,
            intermediate_size=[16384] * LAYERS,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            hidden_size_per_layer_input=256,
            num_kv_shared_layers=15,
            laurel_rank=64,
            sliding_window=512,
            max_position_embeddings=32768,
        ),
        {"context": 4096},
        64,
    ),
    "hrm-text-1b": Model("hrm_text", PRESETS["hrm_text-1b"].to_dict(), {"context": 512}, 64),
    "gemma4-e4b": Model("gemma4", PRESETS["gemma4-e4b"].to_dict(), {"context": 4096}, 64),
}
TINY_THL = _thl(48, vocab_size=97, memory_slots=16, num_heads=2, head_dim=8, local_window=4, query_dim=8)
TINY = {
    "thl-7b": Model("thl", TINY_THL, {}, 6),
    "inl-5b": Model(
        "inl",
        {
            "vocab_size": 97,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_iterations_per_layer": 2,
            "feedforward_dim": 64,
            "max_seq_len": 64,
            "hierarchical_group_size": 8,
        },
        {"context": 64},
        4,
    ),
    "gemma-e4b": Model(
        "gemma3n",
        _gemma(
            7,
            1,
            vocab_size=97,
            vocab_size_per_layer_input=97,
            hidden_size=32,
            intermediate_size=[64] * 7,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=2,
            laurel_rank=4,
            sliding_window=16,
            max_position_embeddings=128,
        ),
        {"context": 64},
        4,
    ),
    "hrm-text-1b": Model(
        "hrm_text",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers_per_stack": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
        },
        {"context": 64},
        4,
    ),
    "gemma4-e4b": Model(
        "gemma4",
        {
            "vocab_size": 97,
            "vocab_size_per_layer_input": 97,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "max_position_embeddings": 128,
        },
        {"context": 64},
        4,
    ),
}
