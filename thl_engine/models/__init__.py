"""The architectures, each defined once in terms of `ops`; the contract that they keep is in contract.py."""

from thl_engine.models import gemma3n, gemma4, him, hrm, hrm_gemma3n, hrm_text, inl, thl
from thl_engine.models.contract import AnyArchitecture

ARCHITECTURES: dict[str, AnyArchitecture] = {
    own.model_type: own
    for own in (
        thl.ARCHITECTURE,
        hrm.ARCHITECTURE,
        hrm_text.ARCHITECTURE,
        him.ARCHITECTURE,
        inl.ARCHITECTURE,
        gemma3n.ARCHITECTURE,
        hrm_gemma3n.ARCHITECTURE,
        gemma4.ARCHITECTURE,
    )
}


def architecture(model_type: str) -> AnyArchitecture:
    """The architecture of that name, one of `thl_engine.config.CONFIGS`."""
    return ARCHITECTURES[model_type]
