"""The choice among the backends, made once, when an engine starts."""

import logging
from collections.abc import Callable
from functools import cache

import torch

from thl_engine.errors import ConfigError
from thl_engine.ops import native
from thl_engine.ops.native_ops import NativeOps
from thl_engine.ops.reference import ReferenceOps


def _native() -> ReferenceOps:
    if not native.available():
        raise ConfigError(f"backend 'native' is not available: {native.reason()}; use backend 'reference'")
    return NativeOps()


def _triton() -> ReferenceOps:
    try:
        from thl_engine.ops import triton_ops
    except ImportError as error:
        raise ConfigError(
            f"backend 'triton' is not available ({error}); install triton or use backend 'reference'"
        ) from None
    return triton_ops.TritonOps()


BACKENDS: dict[str, Callable[[], ReferenceOps]] = {"reference": ReferenceOps, "native": _native, "triton": _triton}


@cache
def _cuda_backend() -> str:
    try:
        _triton()
    except ConfigError as error:
        logging.getLogger("thl_engine").warning("computing with torch's operations, more slowly: %s", error)
        return "reference"
    return "triton"


def load_ops(backend: str, device: str) -> ReferenceOps:
    """The ops of a backend. "auto" takes native on the CPU and triton elsewhere where they are, else the reference."""
    if backend == "auto":
        backend = _cuda_backend() if device != "cpu" else "native" if native.available() else "reference"
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; choose from auto, {', '.join(BACKENDS)}")
    if backend == "native" and device != "cpu":
        raise ConfigError(f"backend 'native' computes on the CPU, not on {device!r}; use backend 'auto'")
    ops = BACKENDS[backend]()
    if device not in ops.devices():
        raise ConfigError(f"backend 'triton' computes on CUDA devices, not on {device!r}; use backend 'auto'")
    return ops


def isa(ops: ReferenceOps) -> str | None:
    """The instruction set that native kernels use; None of other backends."""
    return native.isa() if ops.name == "native" else None


def threads(ops: ReferenceOps) -> int:
    """CPU threads that the backend computes with."""
    return native.threads() if ops.name == "native" else torch.get_num_threads()
