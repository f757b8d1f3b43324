"""The reference operations on a recurrent state: gated cells, the window of recent inputs, the slot memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thl_engine.kernels import slot_memory, tier_cell, window_attention
from thl_engine.ops.products import Products
from thl_engine.ops.weights import Matrix


class StateOps(Products):
    """What backends replace, and what is made of it."""

    gru_reset = staticmethod(tier_cell.gru_reset)
    gru_update = staticmethod(tier_cell.gru_update)
    window_mix = staticmethod(window_attention.window_mix)
    window_append = staticmethod(window_attention.window_append)
    slot_scores = staticmethod(slot_memory.slot_scores)
    slot_topk = staticmethod(slot_memory.slot_topk)
    slot_mix = staticmethod(slot_memory.slot_mix)
    slot_norms = staticmethod(slot_memory.slot_norms)
    read_metadata = staticmethod(slot_memory.read_metadata)
    novelty_write = staticmethod(slot_memory.novelty_write)

    def linear_joined(self, places: Sequence[Tensor], matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        """`linear` of activations [B, C_i] that lie in several places, side by side."""
        return self.linear(torch.cat(list(places), dim=-1), matrix, bias)

    def layer_norm_joined(self, places: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        """`layer_norm` of features [B, C_i] that lie in several places, side by side."""
        return self.layer_norm(torch.cat(list(places), dim=-1), weight, bias)

    def gru_cell(
        self,
        update: tuple[Matrix, Tensor],
        reset: tuple[Matrix, Tensor],
        candidate: tuple[Matrix, Tensor],
        state: Tensor,
        below: Tensor,
        context: Tensor,
        addend: Tensor | None = None,
    ) -> Tensor:
        """The next state [B, d] of a GRU that sees state, below and context + addend; its weights with their biases."""
        if addend is not None:
            context = context + addend
        inputs = torch.cat([state, below, context], dim=-1)
        z, r = self.linear(inputs, *update), self.linear(inputs, *reset)
        inputs = torch.cat([self.gru_reset(r, state), below, context], dim=-1)
        return self.gru_update(z, self.linear(inputs, *candidate), state)

    def window_read(
        self, query: Tensor, buffer: Tensor, valid: int | Tensor, entry: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`window_mix` of the first `valid` entries, at most all, and the buffer after `window_append` of a new one."""
        valid = min(int(valid), buffer.shape[1])
        mixed = self.window_mix(query, buffer, valid, scale)
        return mixed, self.window_append(buffer, valid, entry)[0]

    def slot_read(
        self,
        query: Tensor,
        memory: Tensor,
        read_ema: Tensor,
        last_read: Tensor,
        t: int | Tensor,
        *,
        k: int,
        capacity: int | None,
        scale: float,
        load_penalty: float,
        decay: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A sparse read of the slots: (mixed [B, H, d], alpha, indices [B, H, k], read_ema, last_read [B, J])."""
        alpha, indices = self.slot_topk(self.slot_scores(query, memory, read_ema, scale, load_penalty), k, capacity)
        mixed = self.slot_mix(alpha, indices, memory)
        return mixed, alpha, indices, *self.read_metadata(alpha, indices, read_ema, last_read, t, decay)
