"""A meter of memory without a device: bytes of all tensors that are alive, as they are made and let go."""

import weakref
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class LiveBytes(TorchDispatchMode):
    """Counts storages made while it is on; those of tensors from before are not its own.

    live, peak: bytes now and at most. trace: (number of the storage, its bytes, 0 at its end), in order.
    """

    live: int = 0
    peak: int = 0
    trace: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self._known = {}  # address of a storage -> weak reference that takes it out again
        self._count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._see(given, own=False)
        out = function(*args, **kwargs)
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self._see(made, own=True)
        return out

    def _see(self, tensor, own):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes() if own and tensor.device.type != "meta" else 0
        number, self._count = self._count, self._count + 1

        def end(_):
            del self._known[key]
            if nbytes:
                self.live -= nbytes
                self.trace.append((number, 0))

        self._known[key] = weakref.ref(storage, end)
        if nbytes:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            self.trace.append((number, nbytes))

    def restart(self):
        """Forgets the peak so far."""
        self.peak = self.live
