"""Where a model's bytes lie: pages, which are read and kept as one, and the tensors that are made of them."""

from dataclasses import dataclass
from math import prod

import torch

from thl_engine.files import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Page:
    """Rows [start, stop) of a tensor: `nbytes` bytes at `offset` of file number `file`, without padding.

    crc is the CRC32C of those bytes, None where the file has none. index counts the pages of the whole store.
    """

    index: int
    tensor: str
    start: int
    stop: int
    file: int
    offset: int
    nbytes: int
    crc: int | None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model, or the scales of one, and its pages in row order.

    An int8 tensor names its `scales`; `group` is the number of inputs that share one, None for one a row. Where
    `transposed`, rows, shape and scales are of the transpose of the published matrix.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pages: tuple[Page, ...]
    scales: str | None = None
    group: int | None = None
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def extent(page: Page) -> tuple[int, int]:
    """Aligned (offset, length) that covers a page in its file."""
    start = page.offset - page.offset % ALIGNMENT
    stop = -(-(page.offset + page.nbytes) // ALIGNMENT) * ALIGNMENT
    return start, stop - start


def label(page: Page) -> str:
    """What a page holds, for messages."""
    return f"tensor {page.tensor!r} rows {page.start} to {page.stop}"
