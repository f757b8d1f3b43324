"""What --mode and --max-cycles ask of a model's states."""

from typing import Any

from thl_engine.errors import ConfigError
from thl_engine.models import ARCHITECTURES

OPTIONS = {"cycles": "--mode", "max_cycles": "--max-cycles"}  # of a state -> on the command line


def mode_options(model_type: str, mode: str | None, max_cycles: int | None = None) -> dict[str, Any]:
    """The options of a new state that were asked for. Raises ConfigError for a model without them."""
    given = {"cycles": mode, "max_cycles": max_cycles}
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        able = [other for other, own in ARCHITECTURES.items() if name in own.state_options]
        if model_type not in able:
            raise ConfigError(
                f"{OPTIONS[name]} {value}: {model_type} models have no such option; these have: {', '.join(able)}"
            )
    return options
