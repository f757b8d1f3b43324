"""How an answer is asked for by tags of the kind of answer, in place of a chat template: HRM-Text's instructions.

An instruction stands between two tokens, behind a token for each of its tags. Files may say which tokens these are
(`condition_mapping`, `boq` and `eoq` of tokenizer_config.json, as the published training data has them); else they are
those that the model card of `sapientinc/HRM-Text-1B` names.
"""

from collections.abc import Mapping
from typing import Any

from thl_engine.errors import TokenizerError, shown

TAGS = {
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
BEGIN, END = "<|im_start|>", "<|im_end|>"
USUAL = "synth,cot"  # what the model card recommends for questions without examples


def conditioned(text: str, condition: str, config: Mapping[str, Any], ids: Mapping[str, int]) -> str:
    """The prompt that asks for an answer to `text` under the tags of `condition`, in their order, between commas.

    config: tokenizer_config.json. ids: token -> id. TokenizerError for a tag that is unknown, and for a vocabulary
    without its tokens.
    """
    given = config.get("condition_mapping")
    tags = TAGS if not isinstance(given, Mapping) else {k: v for k, v in given.items() if isinstance(v, str)}
    names = [name.strip() for name in condition.split(",") if name.strip()]
    for name in names:
        if name not in tags:
            raise TokenizerError(f"condition {shown(name)} is unknown; there are {', '.join(map(str, tags))}")
    begin, end = (
        found if isinstance(found := config.get(field), str) else usual
        for field, usual in (("boq", BEGIN), ("eoq", END))
    )
    tokens = [begin, *(tags[name] for name in names), end]
    missing = [token for token in tokens if token not in ids]
    if missing:
        raise TokenizerError(
            f"the vocabulary lacks {', '.join(map(shown, missing[:4]))}, with which this model is asked for answers, "
            "and there is no chat template; put the published tokenizer beside the checkpoint, or continue a text "
            "without --chat"
        )
    return "".join(tokens[:-1]) + text + end
