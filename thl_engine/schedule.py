"""What a model is made of and what each step touches: plain data, shared by the store, the pager and the models.

A model lists its tensors as `Block`s and says, for every step, which blocks the step reads and in which
order (`walk`). Nothing here knows an architecture, a file or a device.
"""

from dataclasses import dataclass
from math import lcm

LARGEST_WALK = 1 << 20  # matrices read by a step, which a walk lists one by one: 64 MiB
KINDS = ("matrix", "table", "vector", "unused")


@dataclass(frozen=True)
class Block:
    """One tensor of a model, under its published name.

    kind:
      matrix  [R, C], read whole and in row order whenever it is used; paged, int8 when quantised
      table   [V, C], rows are gathered by token id, never the whole table; int8 by row when quantised
      vector  norms, biases, scales: float32 and always resident
      unused  takes part in no output: kept in files, never loaded

    exact: stays a float tensor when a model is quantised.
    transposed: products need a few columns of the matrix only, so int8 files keep these as rows, [C, R].
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    exact: bool = False
    transposed: bool = False

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Walk:
    """The matrices that steps read, in order: `clocked` holds (name, clock); step t reads those whose clock divides t.

    A name that a step reads several times appears several times. `may_stop`: a step may end before the last of them.
    """

    clocked: tuple[tuple[str, int], ...]
    may_stop: bool = False

    @property
    def period(self) -> int:
        """Steps after which the reads repeat."""
        return lcm(*(clock for _, clock in self.clocked))

    def reads(self, t: int) -> tuple[str, ...]:
        """Matrices read by step `t`, in order of use."""
        return tuple(name for name, clock in self.clocked if t % clock == 0)
