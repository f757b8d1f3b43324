"""Fields that a configuration has and an architecture does not: mistyped ones, and what other tools have written."""

import difflib
from collections.abc import Collection, Iterable

# What different projects call the same number. A field of one project in the configuration of another is as good as a
# mistyped one, unless it repeats the value.
_CONCEPTS = (
    "dim d_model hidden_size hidden_dim embedding_dim embedding_size embed_dim emb_dim n_embd n_embed model_dim width",
    "layers depth num_layers n_layers n_layer num_hidden_layers num_encoder_layers num_tiers",
    "heads num_heads n_heads n_head nhead num_attention_heads",
    "kv_heads num_kv_heads n_kv_heads num_key_value_heads",
    "d_ff ffn_dim ff_dim feedforward_dim dim_feedforward intermediate_size ffn_hidden_size mlp_dim",
    "max_seq_len max_seq_length max_position_embeddings max_positions n_positions context_length context n_ctx seq_len "
    "sequence_length block_size max_length",
    "vocab_size n_vocab vocab vocabulary vocabulary_size num_tokens",
    "num_iterations_per_layer num_iterations iterations n_iterations steps",
)
_SYNONYMS = {"n": "num", "number": "num", "count": "num", "dim": "size", "width": "size", "emb": "embed"}
_SYNONYMS |= {"embedding": "embed", "vocabulary": "vocab", "epsilon": "eps", "sequence": "seq", "length": "len"}
_SIMILAR = 0.82  # of 1: one letter of six
LONGEST = 64  # letters that are compared


def meant(name: str, known: Collection[str]) -> list[str]:
    """The fields among `known` that `name` is likely to stand for, the likeliest first; none for a name of its own.

    It may be misspelt, be what other projects call the same number, or leave some of the words out.
    """
    words = _words(name[:LONGEST])
    found = misspelt(name, known) or repeated(name, known)
    return found or [field for field in known if words and words < _words(field)]


def misspelt(name: str, known: Collection[str]) -> list[str]:
    """The fields among `known` that `name` differs from by a letter or two, or by the spelling of its words."""
    name = name[:LONGEST].lower()
    same = [field for field in known if _words(field) == _words(name)]
    lowered = {field.lower(): field for field in known}
    similar = difflib.get_close_matches(name, lowered, n=3, cutoff=_SIMILAR)
    close = [lowered[field] for field in similar if _near(name, field)]
    return [*same, *(field for field in close if field not in same)]


def repeated(name: str, known: Iterable[str]) -> list[str]:
    """The fields among `known` that are another project's `name`."""
    concept = next((names for names in map(str.split, _CONCEPTS) if name in names), ())
    return [field for field in known if field in concept and field != name]


def _near(name: str, field: str) -> bool:
    return abs(len(name) - len(field)) <= 2


def _words(name: str) -> frozenset[str]:
    singular = (word.removesuffix("s") if len(word) > 3 else word for word in name.lower().split("_") if word)
    return frozenset(_SYNONYMS.get(word, word) for word in singular)
