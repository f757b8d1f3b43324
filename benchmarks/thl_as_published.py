"""THL's step as its published implementation computes it, in plain eager torch: what a speed is compared with.

Written from the equations in the parity notes' section 5.2, in their order: keys and values of all slots and of the
whole window are projected at every step, weights and state are float32, and each operation is torch's own. It is not
the authors' code. It leaves out what theirs may add (modules, checks, host synchronisation) and is spared nothing that
the equations name, so it is a generous stand-in. Slots that tie are ordered as torch.topk orders them, which on the CPU
reproduces the recorded runs.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from thl_engine.config import THLConfig

EMPTY = 1e-6  # norm of a slot that counts as empty


class PublishedTHL:
    """weights: the published state dict, float32, on the device to compute on."""

    def __init__(self, config: THLConfig, weights: Mapping[str, Tensor]) -> None:
        if config.read_slot_capacity is not None:
            raise ValueError("read_slot_capacity: expected none; reads with a capacity are not transcribed")
        self.config, self.weights = config, weights

    def new_state(self, batch: int = 1) -> dict:
        """Zeros; fields by their published names."""
        c, device = self.config, self.weights["embedding.weight"].device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        slots = c.memory_slots
        return {
            "timestep": 0,
            **{f"tier{k}": zeros(d) for k, d in enumerate(c.tier_dims)},
            "memory_state": zeros(slots, c.memory_dim),
            "read_ema": zeros(slots),
            "write_ema": zeros(slots),
            "last_read": zeros(slots, dtype=torch.int64),
            "last_write": zeros(slots, dtype=torch.int64),
            "local_buffer": zeros(c.local_window, c.embedding_dim),
            "local_valid": 0,
        }

    @torch.no_grad()
    def step(self, tokens: Tensor, s: dict) -> Tensor:
        """Feeds int64 [B]; logits [B, V]. The state is updated."""
        c, w, last = self.config, self.weights, f"tier{self.config.num_tiers - 1}"
        e = w["embedding.weight"][tokens]
        local = self._read_window(e, s)
        read = self._read_memory(torch.cat([e, s["tier0"], s[last]], dim=-1), s)
        below, context = e, read + local
        for k, clock in enumerate(c.tier_timescales):
            if s["timestep"] % clock == 0:
                s[f"tier{k}"] = self._cell(k, s[f"tier{k}"], torch.cat([below, context], dim=-1))
            below, context = s[f"tier{k}"], read
        self._write(torch.cat([s["tier0"], s[last]], dim=-1), s)
        states = torch.cat([s[f"tier{k}"] for k in range(c.num_tiers)], dim=-1)
        s["timestep"] += 1
        hidden = layer_norm(states, states.shape[-1:], w["layer_norm.weight"], w["layer_norm.bias"], 1e-5)
        return linear(hidden, w["output_head.weight"], w["output_head.bias"])

    def _read_window(self, e: Tensor, s: dict) -> Tensor:
        c, w, valid = self.config, self.weights, s["local_valid"]
        local = e.new_zeros(len(e), c.value_dim)
        if valid:
            entries = s["local_buffer"][:, :valid]
            query = linear(e, w["local_attn.q.weight"])
            keys, values = (linear(entries, w[f"local_attn.{name}.weight"]) for name in "kv")
            shares = torch.softmax((keys @ query[:, :, None]).squeeze(-1) / sqrt(c.query_dim), dim=-1)
            local = (shares[:, None] @ values).squeeze(1)
        if valid < c.local_window:
            s["local_buffer"][:, valid] = e
            s["local_valid"] = valid + 1
        elif c.local_window:
            s["local_buffer"] = torch.cat([s["local_buffer"][:, 1:], e[:, None]], dim=1)
        return local

    def _read_memory(self, u: Tensor, s: dict) -> Tensor:
        c, w, batch = self.config, self.weights, len(u)
        query = linear(u, w["router.W_q.weight"]).view(batch, c.num_heads, c.head_dim)
        keys = linear(s["memory_state"], w["router.W_k.weight"]).view(batch, -1, c.num_heads, c.head_dim)
        values = linear(s["memory_state"], w["router.W_v.weight"]).view(batch, c.memory_slots, c.num_heads, -1)
        scores = torch.einsum("bjhd,bhd->bhj", keys, query) / sqrt(c.head_dim)
        best = (scores - c.load_penalty * s["read_ema"][:, None]).topk(c.read_topk, dim=-1)
        alpha = torch.softmax(best.values, dim=-1)
        chosen = best.indices[..., None].expand(-1, -1, -1, values.shape[-1])
        read = (alpha[..., None] * values.transpose(1, 2).gather(2, chosen)).sum(dim=2).flatten(1)
        flat = best.indices.flatten(1)
        added = torch.zeros_like(s["read_ema"]).scatter_add_(1, flat, alpha.flatten(1))
        s["read_ema"] = c.read_ema_decay * s["read_ema"] + (1.0 - c.read_ema_decay) * added
        s["last_read"] = s["last_read"].scatter(1, flat, s["timestep"])
        return read

    def _cell(self, k: int, state: Tensor, x: Tensor) -> Tensor:
        def gate(name: str, first: Tensor) -> Tensor:
            prefix = f"tiers.cells.{k}.{name}."
            return linear(torch.cat([first, x], dim=-1), self.weights[f"{prefix}weight"], self.weights[f"{prefix}bias"])

        z, reset = torch.sigmoid(gate("W_z", state)), torch.sigmoid(gate("W_r", state))
        return (1.0 - z) * state + z * torch.tanh(gate("W_h", reset * state))

    def _write(self, states: Tensor, s: dict) -> None:
        c, memory, t = self.config, s["memory_state"], s["timestep"]
        vector = linear(states, self.weights["writer.W_w.weight"], self.weights["writer.W_w.bias"])
        vector = vector * (c.write_clip_max / (vector.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1.0)
        norms = memory.norm(dim=-1)
        affinity = (memory @ vector[:, :, None]).squeeze(-1)
        affinity = affinity / ((vector.norm(dim=-1, keepdim=True) + 1e-8) * (norms + 1e-8))
        novelty = 1.0 - affinity.amax(dim=-1)
        novel = novelty > c.novelty_theta
        gate = torch.where(novel, torch.sigmoid(c.novelty_beta * (novelty - c.novelty_theta)), 1.0)
        empty = norms <= EMPTY
        by_emptiness = empty * 1e4 - torch.arange(c.memory_slots, device=memory.device)
        by_use = c.stale_weight * (t - s["last_write"]).float() + c.underuse_weight / (1e-8 + s["read_ema"])
        scores = torch.where(empty.any(dim=-1, keepdim=True), by_emptiness, by_use)
        indices = torch.where(novel[:, None], scores, affinity).topk(c.write_slots, dim=-1).indices
        written = torch.zeros_like(s["write_ema"]).scatter_(1, indices, 1.0)
        s["memory_state"] = c.memory_decay * memory + written[..., None] * (gate[:, None] * vector)[:, None]
        s["write_ema"] = c.write_ema_decay * s["write_ema"] + (1.0 - c.write_ema_decay) * written
        s["last_write"] = s["last_write"].scatter(1, indices, t)
