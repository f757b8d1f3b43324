"""The C++ extension (csrc/bind): types for those who call it, which are ops/native.py and the rooms of paging/.

A `Capsule` is what torch.utils.dlpack.to_dlpack makes of a tensor in host memory. It is borrowed for the call, and the
caller keeps it. Letters and rules are those of ops/native.py. Arguments that do not fit raise ValueError.
"""

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor
from typing_extensions import Buffer

Capsule: TypeAlias = object

# --- settings and measurements: bind/linear.cpp

def threads() -> int:
    """Threads that share a call."""

def set_threads(count: int, /) -> None:
    """1 to 1024 threads share a call from now on."""

def isa() -> str:
    """The instruction set in use."""

def available_isas() -> list[str]:
    """Instruction sets that this processor runs, the best one last."""

def set_isa(name: str, /) -> None:
    """Uses another instruction set; results do not change."""

def memory_bandwidth(nbytes: int, repeats: int, /) -> float:
    """Bytes per second at which the threads read memory: the median of `repeats` passes."""

def read_seconds(memory: Capsule, /) -> float:
    """Seconds that the threads take to read float32 [n] once."""

# --- linear maps: bind/linear.cpp

class PackedActivations:
    """Activations as 16-bit integers with a scale a row, and their memory."""

def pack_activations(
    x: Capsule, weight: Capsule | None, bias: Capsule | None, eps: float, into: PackedActivations | None, /
) -> PackedActivations:
    """x [.., C], after a layer normalisation where there is a weight [C]; into the memory of `into`."""

def pack_swiglu(gate: Capsule, up: Capsule, into: PackedActivations | None, /) -> PackedActivations:
    """silu(gate) * up, both [.., C]."""

def linear_int8(
    packed: PackedActivations,
    w: Capsule,
    scales: Capsule,
    bias: Capsule | None,
    out: Capsule,
    start: int,
    gelu: bool,
    addend: Capsule | None,
    /,
) -> None:
    """out [.., R] = x times the transpose of w int8 [R, C], plus bias, gelu and addend where asked for."""

def linear_float(
    x: Capsule, w: Capsule, bias: Capsule | None, out: Capsule, start: int, gelu: bool, addend: Capsule | None, /
) -> None:
    """The same with float weights."""

def multiply_int8(packed: PackedActivations, w: Capsule, scales: Capsule, out: Capsule, start: int, /) -> None:
    """out [.., R] times the product; rows of w for which out is zero are not read."""

def multiply_float(x: Capsule, w: Capsule, out: Capsule, start: int, /) -> None:
    """The same with float weights."""

def linear_transposed(x: Capsule, w: Capsule, scales: Capsule | None, out: Capsule, accumulate: bool, /) -> None:
    """out [B, C] = x [B, R] times w [R, C], int8 with scales or float with None; added to out if `accumulate`."""

# --- state operations: bind/state.cpp

def gru_reset(reset: Capsule, state: Capsule, out: Capsule, /) -> None:
    """out = sigmoid(reset) * state, all [B, d]."""

def gru_update(update: Capsule, candidate: Capsule, state: Capsule, /) -> None:
    """state = (1 - z) * state + z * tanh(candidate) with z = sigmoid(update), all [B, d]."""

def layer_norm(x: Capsule, weight: Capsule, bias: Capsule, eps: float, out: Capsule, /) -> None:
    """Over the last axis of x [.., d]."""

def window_mix(query: Capsule, buffer: Capsule, valid: int, scale: float, out: Capsule, /) -> None:
    """out [B, d] = the first `valid` entries of buffer [B, W, d], weighted by softmax(scale * query . entry)."""

def slot_scores(
    query: Capsule, memory: Capsule, read_ema: Capsule, scale: float, penalty: float, out: Capsule, /
) -> None:
    """out [B, H, J] = scale * query . memory - penalty * read_ema."""

def slot_topk(scores: Capsule, capacity: int, indices: Capsule, alpha: Capsule, /) -> None:
    """The best of scores [B, H, J], as many as indices int64 [B, H, k] holds, and their softmax alpha."""

def slot_mix(alpha: Capsule, indices: Capsule, memory: Capsule, out: Capsule, /) -> None:
    """out [B, H, d] = sum over k of alpha [B, H, k] * the slots of memory [B, J, d] that indices name."""

def read_metadata(
    alpha: Capsule, indices: Capsule, read_ema: Capsule, last_read: Capsule, decay: float, t: int, /
) -> None:
    """Updates read_ema and last_read [B, J] after a read."""

def slot_norms(memory: Capsule, out: Capsule, /) -> None:
    """out [B, J] = Euclidean norms of memory [B, J, d]."""

def novelty_write(
    candidate: Capsule,
    memory: Capsule,
    norms: Capsule,
    read_ema: Capsule,
    write_ema: Capsule,
    last_write: Capsule,
    t: int,
    vector: Capsule,
    gate: Capsule,
    novelty: Capsule,
    branch: Capsule,
    indices: Capsule,
    clip_max: float,
    theta: float,
    beta: float,
    decay: float,
    ema_decay: float,
    stale_weight: float,
    underuse_weight: float,
    /,
) -> None:
    """THL's novelty-gated write of candidate [B, d] into memory [B, J, d] at step t."""

# --- operations of INL, HIM and HRM: bind/transformer.cpp

def rms_norm(x: Capsule, addend: Capsule | None, weight: Capsule | None, eps: float, out: Capsule, /) -> None:
    """out = s / sqrt(mean(s²) + eps) * weight for s = x [.., d] plus, where there is one, addend."""

def rotate(x: Capsule, cos: Capsule, sin: Capsule, out: Capsule, /) -> None:
    """out = x [B, A, T, d] rotated by the tables [T, d]."""

def swiglu(gate: Capsule, up: Capsule, out: Capsule, /) -> None:
    """out = silu(gate) * up, all [.., d]."""

def gelu(x: Capsule, out: Capsule, /) -> None:
    """out = x times the standard normal distribution function of x."""

def geglu(gate: Capsule, up: Capsule, quantile: float | None, out: Capsule, /) -> None:
    """out = gelu(gate) * up, tanh form; with a quantile, of what gate exceeds its mean by that many deviations."""

def attention(
    query: Capsule, key: Capsule, value: Capsule, scale: float, blocked: Capsule | None, out: Capsule, /
) -> None:
    """out [B, A, T, d] = softmax(scale * query keyᵀ) value; blocked uint8 [B, A, T, S]."""

def rotary_attention(joined: Capsule, heads: int, cos: Capsule, sin: Capsule, scale: float, out: Capsule, /) -> None:
    """out [B, T, A·d] = attention among the positions of joined [B, T, 3·A·d], rotated first."""

class KeptMatrix:
    """A copy of a matrix, row by row or transposed, for `integrate`."""

    def __init__(self, transposed: bool, /) -> None: ...

def keep(kept: KeptMatrix, rows: int, start: int, w: Capsule, scales: Capsule | None, /) -> None:
    """Copies rows from `start` on of a matrix of `rows` rows: int8 with a scale a row, or float32 with None."""

def integrate(
    x: Capsule,
    norm_weight: Capsule | None,
    norm_bias: Capsule | None,
    norm_eps: float,
    context: Capsule,
    first: KeptMatrix,
    first_bias: Capsule,
    second: KeptMatrix,
    second_bias: Capsule,
    mu: Capsule,
    group: int,
    steps: int,
    first_check: int,
    threshold: float,
    together: bool,
    values: Capsule,
    iterations: Capsule,
    /,
) -> int:
    """INL's integrator from x [.., D]; a negative threshold is none. Returns the number of steps made."""

# --- operations of HIM's encoder: bind/encoder.cpp

def add_layer_norm(
    x: Capsule, addend: Capsule, weight: Capsule, bias: Capsule, eps: float, total: Capsule, out: Capsule, /
) -> None:
    """total = x + addend, and out its layer normalisation; all [.., d]."""

def add_blend(x: Capsule, fast: Capsule, slow: Capsule, gate: Capsule, out: Capsule, /) -> None:
    """out = x + fast + sigmoid(gate) * (slow - fast), all [.., d] but gate [d]."""

def add_scaled(x: Capsule, addend: Capsule, scale: float, out: Capsule, /) -> None:
    """out = x + scale * addend, all [.., d]."""

def erase_then_add(memory: Capsule, erase: Capsule, add: Capsule, eps: float, out: Capsule, /) -> None:
    """out [B, J, d] = memory * (1 - sigmoid(erase)) + add, each slot then normalised."""

def prefix_read(query: Capsule, rows: Capsule, scale: float, out: Capsule, /) -> None:
    """out [B, T, r] = softmax(scale * query . rows cut to r features) times these rows."""

# --- files: bind/io.cpp

def crc32c(buffer: Buffer, crc: int = 0) -> int:
    """CRC-32C of a contiguous buffer, continuing from `crc`."""

class Arena:
    """Zeroed memory that begins at a multiple of 4096. MemoryError where the system has not as much."""

    def __init__(self, nbytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def nbytes(self) -> int:
        """Bytes, rounded up to 4096."""

class Reader:
    """Reads from a fixed list of files on threads of its own; paging/reader.py says how."""

    def __init__(self, paths: Sequence[str], threads: int, direct: bool, chunk_bytes: int) -> None: ...
    def submit(
        self,
        file: int,
        offset: int,
        nbytes: int,
        arena: Arena,
        arena_offset: int,
        crc: int | None = None,
        label: str = "",
    ) -> int:
        """Queues a read and returns its ticket."""

    def wait(self, ticket: int) -> float:
        """Blocks until the read is over; returns the seconds blocked. CheckpointError where it failed."""

    def done(self, ticket: int) -> bool:
        """Whether `wait` would return at once."""

    def read_now(self, file: int, offset: int, nbytes: int) -> bytearray:
        """Reads on the calling thread, past the queue."""

    @property
    def direct(self) -> list[bool]:
        """For each file, whether it is read with O_DIRECT."""

    @property
    def refused(self) -> bool:
        """Whether a file system refused O_DIRECT."""

    @property
    def bytes_read(self) -> int:
        """Bytes that the system delivered so far."""

    @property
    def inherited(self) -> bool:
        """Whether a fork has brought it into this process, where it can only be closed."""

    def close(self) -> None:
        """Drops what is queued and ends the workers; no arena is written afterwards."""

# --- copies to a device: bind/copy.cpp

class CopyDevice:
    """A device for the copy engine, made by another extension: `_cuda.copy_device`."""

    def __init__(self, capsule: object) -> None: ...

class CopyEngine:
    """Moves pages from files to places in a device's memory; paging/transfer.py says how."""

    def __init__(
        self,
        reader: Reader,
        device: CopyDevice,
        memory: Tensor,
        places: Sequence[int],
        slot_bytes: int,
        slots: int,
        compute: int,
        cufile: str | None = None,
        files: Sequence[str] = ...,
        kept_bytes: int = 0,
    ) -> None: ...
    def start(
        self, file: int, offset: int, nbytes: int, crc: int | None, label: str, place: int, home: int = -1
    ) -> None:
        """Begins to fill a place with bytes of a file, kept in host memory at `home` where that is not negative."""

    def finish(self, place: int, compute: int) -> None:
        """Lets compute issued from now on read the place. CheckpointError where the read failed."""

    def released(self, place: int, compute: int) -> None:
        """Says that the compute that reads the place has been issued."""

    def close(self) -> None:
        """Drops what waits, ends what is under way, gives the staging memory back."""

    @property
    def bytes_copied(self) -> int:
        """Bytes that went over the link so far."""

    @property
    def bytes_direct(self) -> int:
        """Bytes that went past the host's memory so far."""

def copy_seconds(device: CopyDevice, target: Tensor, slots: int, copies: int) -> float:
    """Seconds that copies of the size of `target` take from a page-locked ring: the engine's ceiling."""
