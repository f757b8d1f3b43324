"""Which page is in which slot: the bookkeeping of the ring alone, deterministic, free of clocks and files.

The schedule is known, so nothing here guesses. The pager moves pages by it, and the plan counts bytes with
it beforehand.
"""

from collections import deque
from collections.abc import Iterator

NEVER = 1 << 62  # next use of a page that is not due within the horizon


class Ring:
    """Slots that hold the pages of a known sequence of uses.

    Fetches are issued in the order of use, as far ahead as slots allow. A slot is taken from the page whose next use
    is farthest, never from one that is in use or due before the page being fetched. `horizon` is the number of uses
    looked ahead to know that; twice the number of different pages sees the next use of nearly all.
    """

    def __init__(self, slots: int, horizon: int) -> None:
        self._horizon = max(horizon, 2 * slots)
        self.resident: dict[int, int] = {}  # page -> slot
        self._free = list(range(slots - 1, -1, -1))
        self._future: Iterator[int] = iter(())
        self._ahead: deque[int] = deque()  # uses to come, the next one first
        self._due: dict[int, deque[int]] = {}  # page -> positions of its uses in `_ahead`, absolute
        self._position = 0  # of the next use
        self._fetched = 0  # uses at positions below this one have their page resident or on its way
        self._held: dict[int, int] = {}  # page -> number of uses in progress

    def follow(self, future: Iterator[int]) -> None:
        """Replaces what is expected from now on. Pages already here stay until something else needs their slot."""
        self._future = future
        self._ahead.clear()
        self._due.clear()
        self._fetched = self._position
        self._look()

    def _look(self) -> None:
        while len(self._ahead) < self._horizon:
            page = next(self._future, None)
            if page is None:
                return
            self._due.setdefault(page, deque()).append(self._position + len(self._ahead))
            self._ahead.append(page)

    def fetches(self) -> list[tuple[int, int]]:
        """(page, slot) of the reads to start now, in order of use."""
        issued = []
        while self._fetched - self._position < len(self._ahead):
            page = self._ahead[self._fetched - self._position]
            if page not in self.resident:
                slot = self._slot()
                if slot is None:
                    break
                self.resident[page] = slot
                issued.append((page, slot))
            self._fetched += 1
        return issued

    def _slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim, farthest = None, self._fetched
        for page in self.resident:
            due = self._due.get(page)
            use = due[0] if due else NEVER
            if use > farthest and page not in self._held:
                victim, farthest = page, use
        return None if victim is None else self.resident.pop(victim)

    def use(self, page: int) -> int:
        """Slot of the page, which must be the next one expected; it stays until `release`."""
        if not self._ahead or self._ahead[0] != page:
            expected = self._ahead[0] if self._ahead else None
            raise RuntimeError(f"page {page} was asked for, but the schedule says page {expected}")
        slot = self.resident[page]
        self._pass()
        self._held[page] = self._held.get(page, 0) + 1
        self._look()
        return slot

    def _pass(self) -> None:
        page = self._ahead.popleft()
        due = self._due[page]
        due.popleft()
        if not due:
            del self._due[page]
        self._position += 1

    def expects(self, page: int) -> bool:
        """Whether the page is the next one to be used."""
        return bool(self._ahead) and self._ahead[0] == page

    def skip_to(self, page: int) -> None:
        """Leaves out the uses before the next one of this page: a run that depends on the data has ended early.

        Nothing may be on its way, since what is skipped loses its claim to its slot.
        """
        while not self.expects(page):
            if not self._ahead:
                raise RuntimeError(f"page {page} was asked for, but is not expected any more")
            self._pass()
            self._look()
        self._fetched = max(self._fetched, self._position)

    def release(self, page: int) -> None:
        """Ends a use."""
        self._held[page] -= 1
        if not self._held[page]:
            del self._held[page]
