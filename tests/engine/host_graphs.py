"""Captures on the host, for tests: launches are noted with their tensors and made again at each replay.

As on a device, nothing that is captured has an effect before it is replayed, memory that was captured as empty holds
anything at each replay, and what a capture cannot do raises: a value read by the host, a size that depends on data, a
tensor made of host values.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton.runtime.interpreter import InterpretedFunction

HOST_READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "lift_fresh",
    "_unique2",
    "bincount",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
}
HOST_METHODS = {"tolist", "numpy", "__array__", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class CaptureError(RuntimeError):
    pass


def storages(tree) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_iter(tree) if isinstance(t, torch.Tensor)}


class HostCaptures:
    def __init__(self):
        self.launches = 0  # made by replays
        self.graphs = 0  # replayed
        self._entries = None
        self._made, self._spoilt = set(), []  # storages made, and contents changed, while capturing

    @contextmanager
    def recording(self):
        run = InterpretedFunction.run

        def launch(function, *args, grid, warmup, **kwargs):
            if self._entries is not None:
                with modes.paused():
                    self.keep(args)
                self._entries.append((lambda: run(function, *args, grid=grid, warmup=warmup, **kwargs), 1))
            with modes.paused():
                run(function, *args, grid=grid, warmup=warmup, **kwargs)

        modes = _Modes(self)
        InterpretedFunction.run = launch
        try:
            with modes.functions, modes.dispatch:
                yield
        finally:
            InterpretedFunction.run = run
            self._entries = None
            for tensor, before in reversed(self._spoilt):
                tensor.copy_(before)
            self._made, self._spoilt = set(), []

    def begin(self):
        assert self._entries is None
        self._entries = []

    def end(self):
        entries, self._entries = self._entries, None

        def replay():
            self.graphs += 1
            for entry, launches in entries:
                entry()
                self.launches += launches

        return replay if any(launches for _, launches in entries) else None

    def keep(self, tree):
        """Notes contents from before the capture that may be about to change."""
        for t in tree_iter(tree):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self._made:
                self._spoilt.append((t.detach(), t.detach().clone()))

    def note(self, func, args, kwargs):
        name = func.overloadpacket.__name__
        if name in HOST_READS or (
            name.startswith("index")
            and any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_iter(args[1:]))
        ):
            raise CaptureError(f"{name} reads a value on the host")
        if self._entries is None:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.keep((args, kwargs))
        out = func(*args, **kwargs)
        own = storages((args, kwargs))
        fresh = [
            (i, t)
            for i, t in enumerate(tree_iter(out))
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in own
        ]
        self._made |= storages([t for _, t in fresh])
        if name in ALLOCATIONS:
            self._entries.append((lambda: [spoil(t) for _, t in fresh], 0))
        elif fresh or func._schema.is_mutable:

            def again():
                found = list(tree_iter(func(*args, **kwargs)))
                for i, t in fresh:
                    t.copy_(found[i])

            self._entries.append((again, 1))
        return out


def spoil(tensor):
    return tensor.fill_(float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).min)


class _Modes:
    """Both modes of one recording, which launches are made without."""

    def __init__(self, captures):
        self._paused = False
        modes = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if not modes._paused and getattr(func, "__name__", "") in HOST_METHODS:
                    raise CaptureError(f"{func.__name__} reads a value on the host")
                return func(*args, **(kwargs or {}))

        class Dispatch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if modes._paused:
                    return func(*args, **(kwargs or {}))
                return captures.note(func, args, kwargs or {})

        self.functions, self.dispatch = Functions(), Dispatch()

    @contextmanager
    def paused(self):
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
