"""Models whose tensors have shapes and a device but no memory: any size runs anywhere, a tensor on the wrong device is
an error, and values that the host would wait for are noted."""

import traceback
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thl_engine.config import parse_config
from thl_engine.models import architecture
from thl_engine.ops.weights import Part

PAGE = 8 << 20
DEVICE = torch.device("cpu:0")  # of another name than "cpu", so that fakes on the two do not mix; needs no CUDA
_aten = torch.ops.aten


@dataclass(frozen=True)
class FakeMatrix:
    """A matrix in pages, as an engine has it; its rows too, as a table."""

    data: torch.Tensor
    scales: torch.Tensor | None
    transposed: bool = False

    @property
    def shape(self):
        return tuple(self.data.shape)

    def parts(self):
        rows = max(PAGE // (self.data.shape[1] * self.data.element_size()), 1)
        for first in range(0, self.data.shape[0], rows):
            span = slice(first, min(first + rows, self.data.shape[0]))
            yield Part(span.start, span.stop, self.data[span], None if self.scales is None else self.scales[span])

    def resident(self):
        """As if streamed, which takes more memory."""

    def stored(self):
        scales = None if self.scales is None else self.scales.to("meta")
        return Part(0, self.data.shape[0], self.data.to("meta"), scales)

    def rows(self, ids):
        return torch.empty(*ids.shape, self.data.shape[1], device=self.data.device)


class FakeModel:
    """An architecture's functions on fake weights. Used inside `mode`."""

    def __init__(self, model_type, fields, int8=True, device=DEVICE):
        self.mode = FakeTensorMode()
        self.model, self.config, self.device = architecture(model_type), parse_config(fields, model_type), device
        self.weights = {}
        with self.mode:
            for block in self.model.blocks(self.config):
                if block.kind == "vector":
                    self.weights[block.name] = torch.empty(block.shape, device=device)
                elif block.kind in ("matrix", "table"):
                    by_columns = int8 and block.transposed
                    data = torch.empty(
                        block.shape[::-1] if by_columns else block.shape,
                        dtype=torch.int8 if int8 else torch.float32,
                        device=device,
                    )
                    scales = torch.empty(data.shape[0], device=device) if int8 else None
                    self.weights[block.name] = FakeMatrix(data, scales, by_columns)

    @property
    def _matrices(self):
        names = [block.name for block in self.model.blocks(self.config) if block.kind == "matrix"]
        return [self.weights[name] for name in names]

    @property
    def page_elements(self):
        """Weights of the largest page."""
        return max(part.data.numel() for matrix in self._matrices for part in matrix.parts())

    @property
    def columns(self):
        """Of the widest matrix."""
        return max(matrix.shape[1] for matrix in self._matrices)

    def tokens(self, batch, length):
        return torch.zeros(batch, length, dtype=torch.int64, device=self.device)

    def state(self, batch=1, **options):
        return self.model.init_state(self.config, batch, self.device, self.weights, **options)


@dataclass
class HostReads(TorchDispatchMode):
    """Notes where the host waits for a value of the device, or sends it one, and answers such that nothing stops early.

    found: "file:line" of this project for each, without repetition.
    """

    found: set[str] = field(default_factory=set)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is _aten._local_scalar_dense.default:
            self._note()
            return 0 if args[0].dtype != torch.bool else False
        if function is _aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._note()
            return args[0].new_empty(args[0].shape)
        devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()}
        out = function(*args, **kwargs)
        devices |= {x.device for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dim()}
        if len(devices) > 1 and torch.device("meta") not in devices:
            self._note()
        return out

    def _note(self):
        own = [
            frame
            for frame in traceback.extract_stack()
            if "/thl_engine/" in frame.filename or "/kernels/" in frame.filename
        ]
        self.found.add(f"{own[-1].filename.rpartition('thl_engine/')[2]}:{own[-1].lineno} {own[-1].line}")
