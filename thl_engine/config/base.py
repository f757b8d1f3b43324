"""What all configurations have in common: frozen dataclasses with the field names of the published projects."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from thl_engine.errors import ConfigError, shown

LARGEST_CYCLES = 64  # of hierarchical reasoning; bounds the length of a walk, which lists every revisit
LARGEST = 1 << 31  # no size field of a real model comes near; keeps products of a few sizes within 64 bits
LARGEST_COUNT = 4096  # of what is listed one by one: layers, and repetitions within a step

# What Hugging Face's libraries write into any config.json: about their programs, and defaults of what they generate.
HUGGING_FACE = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label is_decoder is_encoder_decoder label2id length_penalty
    max_length min_length model_max_length name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unk_token_id use_bfloat16 use_cache use_return_dict
    """.split()
)


class Config:
    """Base of the architectures' configurations. Unknown fields and values that cannot work are refused.

    signature: fields that tell the architecture where no model_type is given. ignored: published fields that change
    nothing at inference, accepted so that published files load unchanged, as those of `HUGGING_FACE` are. training:
    those of them that act in published training and are not applied here. layers: fields that count layers, each of
    which has tensors.
    """

    model_type: ClassVar[str]
    signature: ClassVar[frozenset[str]]
    ignored: ClassVar[frozenset[str]] = frozenset()
    training: ClassVar[frozenset[str]] = frozenset()
    layers: ClassVar[tuple[str, ...]] = ()
    vocab_size: int

    @classmethod
    def published(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields of a published config.json as this dataclass has them. Raises ConfigError, which begins with
        `where`."""
        return dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        values = asdict(self)  # type: ignore[call-overload]  # every configuration is a dataclass
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"model_type": self.model_type, **lists}


def check_seed(seed: object, most: int = (1 << 63) - 1) -> None:
    """Raises ConfigError for what seeds no random numbers."""
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    require(whole and 0 <= seed <= most, "seed", seed, f"a whole number from 0 to {most}")  # type: ignore[operator]


def require_counts(config: Config, *names: str) -> None:
    """Raises ConfigError unless those fields are from 1 to LARGEST_COUNT: they are listed before a file is compared."""
    for name in names:
        value = vars(config)[name]
        require(1 <= value <= LARGEST_COUNT, name, value, f"from 1 to {LARGEST_COUNT}")


def require(holds: bool, name: str, value: Any, needed: str) -> None:
    """Raises ConfigError that says what a field is and must be, unless it holds."""
    if not holds:
        found = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{name} is {shown(found)}; it must be {needed}")
