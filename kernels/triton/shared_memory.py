"""HIM's slot memory written in one launch; the reference is in ../shared_memory.py."""

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.shared_memory import NORM_EPS
from thl_engine.kernels.triton.norm import check_width


@triton.jit
def _erase_then_add(
    memory, erase, add, out, slots, width, eps, memory_batch, memory_row, erase_row, add_row, WIDTH: tl.constexpr
):
    slot, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < width
    kept = tl.sigmoid(-tl.load(erase + b * erase_row + d, mask=inside, other=0.0).to(tl.float32))
    values = tl.load(memory + b * memory_batch + slot * memory_row + d, mask=inside, other=0.0).to(tl.float32) * kept
    values += tl.load(add + b * add_row + d, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(inside, values - tl.sum(values, axis=0) / width, 0.0)
    values *= tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) / width + eps))
    tl.store(out + (b * slots + slot) * width + d, values, mask=inside)


def erase_then_add(memory: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """As the reference: memory [B or 1, m, D], erase and add [B, D] -> [B, m, D]."""
    batch, (slots, width) = erase.shape[0], memory.shape[1:]
    check_width(width)
    memory, erase, add = (x if x.stride(-1) == 1 or width == 1 else x.contiguous() for x in (memory, erase, add))
    out = memory.new_empty(batch, slots, width)
    size = triton.next_power_of_2(width)
    if out.numel():
        _erase_then_add[slots, batch](
            memory,
            erase,
            add,
            out,
            slots,
            width,
            NORM_EPS,
            memory.stride(0) if memory.shape[0] > 1 else 0,
            memory.stride(1),
            erase.stride(0),
            add.stride(0),
            WIDTH=size,
            num_warps=min(max(size // 512, 1), 32),
        )
    return out
