"""What a model is made of and what each step touches: plain data, shared by the store, the pager and the models.

A model lists its tensors as `Block`s and says, for every step, which blocks the step reads and in which
order (`walk`). Nothing here knows an architecture, a file or a device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("matrix", "table", "vector", "unused")


@dataclass(frozen=True)
class Block:
    """One tensor of a model, under its published name.

    kind:
      matrix  [R, C], read whole and in row order whenever it is used; paged, int8 when quantised
      table   [V, C], rows are gathered by token id, never the whole table; int8 by row when quantised
      vector  norms, biases, scales: float32 and always resident
      unused  takes part in no output: kept in files, never loaded
    """

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Walk:
    """The reads of a repeating schedule: `steps[t % period]` names the matrices that step t reads, in order."""

    steps: tuple[tuple[str, ...], ...]

    @property
    def period(self) -> int:
        return len(self.steps)

    def reads(self, t: int) -> tuple[str, ...]:
        """Matrices read by step `t`, in order of use."""
        return self.steps[t % len(self.steps)]

    def following(self, t: int) -> Iterator[str]:
        """Matrices read from step `t` on, without end."""
        while True:
            yield from self.reads(t)
            t += 1
