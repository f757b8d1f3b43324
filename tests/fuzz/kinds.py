"""What the fuzz harness knows of a kind of file, and small models to make files of."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import save_file

from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.checkpoint.store import open_store
from thl_engine.config import CONFIGS

Cases = tuple[Callable[[Random], Any], Callable[[Any], object]]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    prepare: of an empty folder, makes (case of a random stream, check of a case). The check succeeds or raises an
    EngineError. share: so many times fewer cases than of other kinds, for those that start a process each.
    """

    prepare: Callable[[Path], Cases]
    share: int = 1


KINDS: dict[str, Kind] = {}


def kind(name: str, share: int = 1) -> Callable[[Callable[[Path], Cases]], Callable[[Path], Cases]]:
    """Lists what it decorates under a name."""

    def listed(prepare: Callable[[Path], Cases]) -> Callable[[Path], Cases]:
        KINDS[name] = Kind(prepare, share)
        return prepare

    return listed


def any_of(folder: Path, sorts: dict[str, Callable[[Path], Cases]]) -> Cases:
    """Cases of several sorts of a kind, as many of each on average."""
    made: dict[str, Cases] = {}
    for name, prepare in sorts.items():
        (folder / name).mkdir()
        made[name] = prepare(folder / name)

    def make(random: Random) -> tuple[str, Any]:
        name = random.choice(list(made))
        return name, made[name][0](random)

    return make, lambda case: made[case[0]][1](case[1])


THL = dict(vocab_size=40, embedding_dim=8, num_tiers=2, tier_dims=[8, 8], tier_timescales=[1, 2], local_window=2)
THL |= dict(memory_slots=4, memory_dim=8, query_dim=4, value_dim=8, num_heads=2, head_dim=4, read_topk=2)
GEMMA = dict(vocab_size=40, vocab_size_per_layer_input=40, hidden_size=8, hidden_size_per_layer_input=4)
GEMMA |= dict(intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
GEMMA |= dict(layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, altup_num_inputs=2)
GEMMA |= dict(laurel_rank=2, activation_sparsity_pattern=[0.5, 0.0], max_position_embeddings=16, sliding_window=4)
GEMMA4 = {name: value for name, value in GEMMA.items() if name not in ("altup_num_inputs", "laurel_rank")}
GEMMA4 |= dict(global_head_dim=6, use_double_wide_mlp=True, num_hidden_layers=4, num_kv_shared_layers=2)
GEMMA4 |= dict(layer_types=["sliding_attention", "full_attention"] * 2, attention_k_eq_v=True)
del GEMMA4["activation_sparsity_pattern"]
SMALL: dict[str, dict] = {
    "thl": THL,
    "inl": dict(vocab_size=40, d_model=8, num_layers=2, num_heads=2, num_iterations_per_layer=2, max_seq_len=8),
    "him": dict(vocab_size=40, embed_dim=64, num_heads=4, num_kv_heads=2, num_encoder_layers=3, dim_feedforward=8),
    "hrm": dict(vocab_size=40, hidden_size=8, num_heads=2, L_layers=1, H_layers=1, expansion=1.0, halt_max_steps=2),
    "hrm_text": dict(vocab_size=40, hidden_size=8, intermediate_size=8, num_layers_per_stack=1, num_attention_heads=2)
    | dict(head_dim=4, max_position_embeddings=16),
    "gemma3n": GEMMA,
    "gemma4": GEMMA4,
    "hrm_gemma3n": GEMMA | {"hrm": dict(L_size=4, H_size=4, cycles=2, L_steps=2, L_rank=2, H_rank=2)},
}
assert SMALL.keys() == CONFIGS.keys()


def parts(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def plain(folder: Path) -> Path:
    """A tiny float checkpoint of THL with its config.json."""
    init_checkpoint("thl", THL, folder / "packed.safetensors")
    with open_store(folder / "packed.safetensors") as store:
        save_file({name: store.read(name) for name in store.tensors}, folder / "model.safetensors")
    (folder / "packed.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "thl", **THL}))
    return folder / "model.safetensors"


def open_and_read(path: Path) -> None:
    with open_store(path) as store:
        for name in store.tensors:
            store.read(name)
