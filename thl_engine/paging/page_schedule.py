"""A model's walk in pages: which pages each step reads, in order."""

from collections.abc import Iterator, Mapping

from thl_engine.checkpoint.store import Store
from thl_engine.schedule import Walk


class PageSchedule:
    """A model's walk in pages: which pages each step reads, which the logits read, and endless futures of both."""

    def __init__(
        self,
        store: Store,
        walk: Walk,
        head: tuple[str, ...],
        products: Mapping[str, float] | None = None,
        touched: Mapping[str, float] | None = None,
    ) -> None:
        """products: how many products a reading of a matrix serves, where it is not one. touched: the share of a matrix
        that they need, where it is not all."""
        self._pages = {
            name: tuple(page.index for page in tensor.pages)
            for name, tensor in store.tensors.items()
            if tensor.kind == "matrix"
        }
        self.may_stop = walk.may_stop
        self._walk = walk
        self.head_names = head
        self.head = self._in_pages(head)
        self.period = walk.period
        self._products = products or {}
        self._touched = {page: share for name, share in (touched or {}).items() for page in self._pages[name]}
        self._runs: dict[tuple[str, ...], tuple[int, ...]] = {}  # names read -> their streamed pages
        self._pinned: frozenset[int] = frozenset()

    def _in_pages(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(page for name in names for page in self._pages[name])

    def step(self, t: int) -> tuple[int, ...]:
        """Pages that step `t` reads, in order."""
        return self._in_pages(self._walk.reads(t))

    def reads(self, t: int) -> tuple[str, ...]:
        """Matrices that step `t` reads, in order, without those of the logits."""
        return self._walk.reads(t)

    def pages(self, name: str) -> tuple[int, ...]:
        """Pages of a matrix, in order."""
        return self._pages[name]

    def products(self, name: str) -> float:
        """Products that are made with a matrix each time that it is read."""
        return self._products.get(name, 1)

    def touched(self, page: int) -> float:
        """Share of a page that products read from memory each time that it is used."""
        return self._touched.get(page, 1.0)

    def uses(self) -> dict[int, float]:
        """Page -> uses per token of decoding."""
        count = dict.fromkeys(self.head, 1.0)
        for name, clock in self._walk.clocked:
            for page in self._pages[name]:
                count[page] = count.get(page, 0.0) + 1.0 / clock
        return count

    def pin(self, pinned: frozenset[int]) -> None:
        """Leaves pinned pages out of the futures."""
        self._pinned = pinned
        self._runs.clear()

    def _streamed(self, names: tuple[str, ...]) -> tuple[int, ...]:
        if names not in self._runs:
            self._runs[names] = tuple(page for page in self._in_pages(names) if page not in self._pinned)
        return self._runs[names]

    def decode(self, t: int) -> Iterator[int]:
        """Streamed pages of the steps from `t` on, each followed by its logits."""
        clocks = {clock for name, clock in self._walk.clocked if not self._pinned.issuperset(self._pages[name])}
        head = tuple(page for page in self.head if page not in self._pinned)
        if head:
            clocks.add(1)
        while clocks:
            t = min(-(-t // clock) * clock for clock in clocks)  # on to the next step that streams anything
            yield from self._streamed(self._walk.reads(t))
            yield from head
            t += 1

    def once(self, names: tuple[str, ...]) -> Iterator[int]:
        """Streamed pages of the named matrices, in order."""
        return iter(self._streamed(names))

    def once_then(self, names: tuple[str, ...], t: int) -> Iterator[int]:
        """The same, then their logits and the steps from `t` on."""
        yield from self._streamed(names)
        yield from (page for page in self.head if page not in self._pinned)
        yield from self.decode(t)

    def prompt(self, t: int, count: int) -> Iterator[int]:
        """As `decode` with logits only after `count` steps, then decoding."""
        for i in range(count - 1):
            yield from self._streamed(self._walk.reads(t + i))
        yield from self.decode(t + count - 1)
