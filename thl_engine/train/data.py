"""Text to batches: split it, make a tokenizer, and lay the tokens out as lanes that carry their state."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thl_engine.errors import ConfigError
from thl_engine.text.tokenizer import Tokenizer

LARGEST_VOCABULARY = 1 << 31
BYTES = 256  # alphabet of a byte-level tokenizer: every text can be encoded, whatever it was trained on


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ConfigError where it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the text {path}: {error.strerror}; give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not text.strip():
        raise ConfigError(f"the text {path} is empty; give a file with some text to learn from")
    return text


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """The text without its last part, and that part: `held_out` of the characters."""
    cut = len(text) - round(len(text) * held_out)
    return text[:cut], text[cut:]


def train_bpe(text: str, vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE with exactly `vocab_size` entries, learnt from `text`.

    Decoding what it encoded gives the text back, whatever its characters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < BYTES:
        raise ConfigError(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {BYTES}; "
            "--tokenizer-type char takes the characters of the text"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ConfigError(
            f"the text yields a vocabulary of {found} entries only, not {vocab_size}; "
            f"set vocab_size to {found} or less, or use more text"
        )
    return tokenizer.to_str()


def character_vocabulary(text: str) -> str:
    """The JSON of a vocabulary with one id for each character of `text`, and <unk> for any other."""
    return json.dumps({char: i for i, char in enumerate(["<unk>", *sorted(set(text))])}, ensure_ascii=False)


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids of a text: int64 [n]."""
    return torch.tensor(tokenizer.encode(text), dtype=torch.int64)


@dataclass(frozen=True)
class Lanes:
    """Chunks of a token sequence, cut into `batch_size` lanes that are read side by side.

    Chunk i is a pure function of (tokens, sizes, seed, i), so that a resumed run needs no position but i.
    Each pass over the tokens starts somewhere else, which moves the places where the lanes are cut; the end
    of the text is followed by its beginning.
    """

    tokens: Tensor
    batch_size: int
    chunk: int
    carry: int
    seed: int

    def __post_init__(self) -> None:
        needed = self.batch_size * self.chunk
        if len(self.tokens) < needed:
            raise ConfigError(
                f"the text is too short: it has {len(self.tokens)} training tokens and "
                f"{self.batch_size} sequences of {self.chunk} need {needed}; use more text, or "
                f"a smaller batch or chunk"
            )

    @property
    def chunks_per_pass(self) -> int:
        return len(self.tokens) // self.batch_size // self.chunk

    def fresh(self, index: int) -> bool:
        """Whether chunk `index` starts from empty states: with each pass, and every `carry` tokens in it."""
        return index % self.chunks_per_pass % max(1, self.carry // self.chunk) == 0

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of chunk `index`, both int64 [batch_size, chunk]."""
        count, (cycle, position) = len(self.tokens), divmod(index, self.chunks_per_pass)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + cycle)
        offset = int(torch.randint(count, (), generator=generator))
        starts = offset + torch.arange(self.batch_size) * (count // self.batch_size) + position * self.chunk
        window = self.tokens[(starts[:, None] + torch.arange(self.chunk + 1)) % count]
        return window[:, :-1], window[:, 1:]
