"""What a model's options are on the command line, and how hard it worked: segments of HRM, iterations of INL."""

from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from thl_engine.engine import Engine, Trace
from thl_engine.errors import ConfigError
from thl_engine.models import ARCHITECTURES, architecture
from thl_engine.models.hrm import parse_cycles


def mode_options(model_type: str, mode: str | None) -> dict[str, Any]:
    """The options of a new state that --mode asks for. Raises ConfigError for a model without modes."""
    if mode is None:
        return {}
    if not has_modes(model_type):
        able = ", ".join(name for name in ARCHITECTURES if has_modes(name))
        raise ConfigError(f"--mode {mode}: {model_type} models have no modes; these have: {able}")
    return {"cycles": parse_cycles(mode)}


def has_modes(model_type: str) -> bool:
    """Whether a state of the model can be made with cycles."""
    return "cycles" in signature(architecture(model_type).init_state).parameters


def open_state(engine: Engine, file: str | None, mode: str | None) -> Any:
    """A new state, or the one in `file`, in the given mode."""
    options = mode_options(engine.model_type, mode)
    if file is None:
        return engine.new_state(**options)
    state = engine.load_state(file)
    return replace(state, **options) if options else state


def traced(engine: Engine) -> tuple[str, ...]:
    """Names in a trace that `effort` reads; none for models that work equally hard at every token."""
    if engine.model_type == "inl":
        return tuple(f"layer{i}.iterations_used" for i in range(engine.config.num_layers))
    return ("num_segments",) if has_modes(engine.model_type) else ()


def effort(trace: Trace | None) -> dict[str, Any]:
    """Means over the steps of a trace, prompt included: segments a step, iterations a token of each layer."""
    seen: dict[str, list[torch.Tensor]] = {}
    for step in trace.steps if trace is not None else ():
        for name, value in step.items():
            seen.setdefault(name, []).append(value.double().flatten())
    means = {name: float(torch.cat(values).mean()) for name, values in seen.items()}
    if "num_segments" in means:
        return {"segments_per_token": means["num_segments"]}
    return {"iterations_per_layer": list(means.values())} if means else {}
