"""Errors that a user can mend. Each message is one line: what is wrong, where, and what would work."""


class EngineError(Exception):
    """Base of every error that the engine raises on purpose; commands print it and exit with code 1."""


class CheckpointError(EngineError):
    """A model file is missing, damaged, or does not hold the tensors its architecture needs."""


class ConfigError(EngineError):
    """A configuration or an option has an unknown field or a value that cannot work."""


class BudgetError(EngineError):
    """The memory budget is smaller than the least that the model runs with."""


class TokenizerError(EngineError):
    """A tokenizer is missing or damaged, or text or token ids do not fit its vocabulary."""


class DeviceError(EngineError):
    """The compute device, its driver, or what it needs of the host's memory has failed."""


def shown(name: object) -> str:
    """A name out of a file, quoted and shortened, so that no message spans lines or pages."""
    text = repr(name)
    return text if len(text) <= 120 else text[:100] + "..." + text[-10:]


def said(reason: object) -> str:
    """What a library or a foreign file says of a failure: its first line, shortened, with escapes for what no terminal
    should be sent."""
    lines = str(reason)[:1000].strip().splitlines()
    text = lines[0] if lines else type(reason).__name__
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= 160 else text[:150] + "..." + text[-7:]
