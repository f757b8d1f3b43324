"""Perplexity and bits per character of a checkpoint on the end of a text, read as one sequence from its beginning.

python examples/evaluate.py CHECKPOINT TEXT [--held-out 0.1] [--quantize none] [--backend auto]
"""

import argparse
import math
from pathlib import Path

import torch

from thl_engine import Engine
from thl_engine.train.data import read_text, split_text

CHUNK = 256  # tokens whose logits are in memory at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the text, at its end (default: 0.1)")
    parser.add_argument("--quantize", default="auto", choices=("auto", "int8", "none"))
    parser.add_argument("--backend", default="auto")
    given = parser.parse_args()

    engine = Engine.from_pretrained(given.checkpoint, quantize=given.quantize, backend=given.backend, device="cpu")
    _, text = split_text(read_text(given.text), given.held_out)
    tokens = torch.tensor([engine.tokenizer.encode(text)])
    state, nats = engine.new_state(), 0.0
    for start in range(0, tokens.shape[1] - 1, CHUNK):
        part = tokens[:, start : start + CHUNK + 1]
        logits, state = engine.forward(part[:, :-1], state)
        nats += float(torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="sum"))
    predicted = tokens.shape[1] - 1
    print(
        f"{len(text):,} characters, {predicted:,} tokens: perplexity {math.exp(nats / predicted):.3f}, "
        f"{nats / math.log(2) / len(text):.4f} bits per character"
    )


if __name__ == "__main__":
    main()
