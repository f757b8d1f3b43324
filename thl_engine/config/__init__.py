"""One frozen dataclass per architecture, with the field names of the published projects.

A configuration travels with its checkpoint. Unknown fields and values that cannot work are refused with the
field's name; nothing is guessed.
"""

from thl_engine.config.base import LARGEST_CYCLES, Config
from thl_engine.config.gemma import FULL, SLIDING, GemmaConfig
from thl_engine.config.gemma3n import Gemma3nConfig
from thl_engine.config.gemma4 import Gemma4Config
from thl_engine.config.him import HIM_POSITIONS, HIMConfig
from thl_engine.config.hrm import HRMConfig
from thl_engine.config.hrm_gemma3n import HRMGemma3nConfig, ReasoningConfig
from thl_engine.config.hrm_text import HRMTextConfig
from thl_engine.config.inl import INLConfig
from thl_engine.config.parse import CONFIGS, parse_config, unapplied
from thl_engine.config.presets import PRESETS, named_config
from thl_engine.config.thl import THLConfig

__all__ = [
    "CONFIGS",
    "FULL",
    "HIM_POSITIONS",
    "LARGEST_CYCLES",
    "PRESETS",
    "SLIDING",
    "Config",
    "Gemma3nConfig",
    "Gemma4Config",
    "GemmaConfig",
    "HIMConfig",
    "HRMConfig",
    "HRMGemma3nConfig",
    "HRMTextConfig",
    "INLConfig",
    "ReasoningConfig",
    "THLConfig",
    "named_config",
    "parse_config",
    "unapplied",
]
