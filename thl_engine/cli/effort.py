"""What a model's options are on the command line, and how hard it worked: segments, cycles, iterations."""

from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from thl_engine.engine.engine import Engine
from thl_engine.engine.trace import Trace
from thl_engine.errors import ConfigError
from thl_engine.models import ARCHITECTURES, architecture, hrm, hrm_gemma3n

REASONING = ("cycles_used", "L_steps", "L_residual", "q_values")  # of HRM-Gemma's traces


def mode_options(model_type: str, mode: str | None, max_cycles: int | None = None) -> dict[str, Any]:
    """The options of a new state that --mode and --max-cycles ask for. Raises ConfigError for a model without them."""
    options = {"cycles": mode, "max_cycles": max_cycles}
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        able = [other for other in ARCHITECTURES if _takes(other, name)]
        if model_type not in able:
            option = "--mode" if name == "cycles" else "--max-cycles"
            raise ConfigError(
                f"{option} {value}: {model_type} models have no such option; these have: {', '.join(able)}"
            )
    return options


def _takes(model_type: str, option: str) -> bool:
    return option in signature(architecture(model_type).init_state).parameters


def open_state(engine: Engine, file: str | None, mode: str | None, max_cycles: int | None = None) -> Any:
    """A new state, or the one in `file`, in the given mode."""
    options = mode_options(engine.model_type, mode, max_cycles)
    if file is None:
        return engine.new_state(**options)
    state = engine.load_state(file)
    if not options:
        return state
    if engine.model_type == "hrm":
        return replace(state, cycles=hrm.parse_cycles(mode))
    return replace(state, cycles=hrm_gemma3n.parse_cycles(engine.config, mode or state.cycles, max_cycles))


def traced(engine: Engine) -> tuple[str, ...]:
    """Names in a trace that `effort` reads; none for models that work equally hard at every token."""
    if engine.model_type == "inl":
        return tuple(f"layer{i}.iterations_used" for i in range(engine.config.num_layers))
    return {"hrm": ("num_segments",), "hrm_gemma3n": REASONING}.get(engine.model_type, ())


def effort(trace: Trace | None) -> dict[str, Any]:
    """Means over the steps of a trace, prompt included: segments a step, iterations a token of each layer, cycles."""
    seen: dict[str, list[torch.Tensor]] = {}
    for step in trace.steps if trace is not None else ():
        for name, value in step.items():
            seen.setdefault(name, []).append(value.double())
    if "cycles_used" in seen:
        return _reasoning(*(torch.cat(seen[name]) for name in REASONING))
    means = {name: float(torch.cat([value.flatten() for value in values]).mean()) for name, values in seen.items()}
    if "num_segments" in means:
        return {"segments_per_token": means["num_segments"]}
    return {"iterations_per_layer": list(means.values())} if means else {}


def _reasoning(
    used: torch.Tensor, updates: torch.Tensor, residuals: torch.Tensor, q_values: torch.Tensor
) -> dict[str, float]:
    """Means over the positions [P] that were thought about, and their cycles [P, N]."""
    halt, proceed = q_values.flatten(0, 1).nanmean(dim=0).tolist()
    return {
        "cycles_per_token": float(used.mean()),
        "L_steps_per_cycle": float(updates.sum() / used.sum()),
        "L_residual": float(residuals.nanmean()),
        "q_halt": halt,
        "q_continue": proceed,
    }


def described(stats: dict[str, Any]) -> str:
    """What HRM-Gemma's reasoning took, for people."""
    return (
        f"{stats['cycles_per_token']:.2f} cycles a token, {stats['L_steps_per_cycle']:.2f} L updates each, after "
        f"which the last changed z_L by {stats['L_residual']:.3g}; q halt {stats['q_halt']:.3g}, continue "
        f"{stats['q_continue']:.3g}"
    )
