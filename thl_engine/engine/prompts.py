"""What stands before the token loop: a prompt's ids, and how many tokens there is room to write after it."""

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from thl_engine.errors import ConfigError, TokenizerError, shown
from thl_engine.models.contract import AnyArchitecture
from thl_engine.text.tokenizer import ByteTokenizer, Tokenizer

NEW_TOKENS = 128  # written where no number is asked for and the context has room

_log = logging.getLogger("thl_engine")


def check_new_tokens(count: Any) -> None:
    """ConfigError for what is no number of tokens; None leaves it to the context."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ConfigError(f"max_new_tokens is {shown(count)}; it must be a whole number, 0 or more")


def new_tokens(check_room: Callable[[int], None], length: int, asked: int | None) -> int:
    """Tokens to write after a prompt of `length`: as asked, or NEW_TOKENS or the fewer that fit.

    check_room: raises ConfigError where a state has no room for so many more; the last token written is not read.
    """
    count = 1 if asked is None else asked
    try:
        check_room(length + max(count - 1, 0))
    except ConfigError as error:
        raise ConfigError(f"a prompt of {length} tokens and {count} new ones: {error}") from None
    if asked is not None:
        return asked

    def full(more: int) -> bool:
        try:
            check_room(length + more)
        except ConfigError:
            return True
        return False

    return 1 + bisect_left(range(1, NEW_TOKENS), True, key=full)


def bytes_as_text(architecture: AnyArchitecture, config: Any, where: str) -> Tokenizer:
    """What takes a text where the checkpoint has no tokenizer: the bytes of the published THL, else TokenizerError."""
    try:
        if architecture.byte_text:
            tokenizer = ByteTokenizer(config.vocab_size)
            _log.warning("%s: no tokenizer in or beside the checkpoint; text is taken as bytes", where)
            return tokenizer
    except TokenizerError:
        pass  # a vocabulary smaller than its table
    raise TokenizerError(
        f"{where}: no tokenizer in or beside the checkpoint; put its tokenizer.json there, or give the prompt as token "
        "ids (--prompt-ids)"
    )
