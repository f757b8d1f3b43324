"""Perplexity and bits per character of a checkpoint on the end of a text, read as one sequence from its beginning.

A model of limited context reads it in windows that begin anew half a context later, so that every token but the first
ones has at least half a context before it.

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
    longest, nats = engine.architecture.longest(engine.config), 0.0
    state = engine.new_state()
    step = CHUNK if longest is None else longest // 2
    for start in range(0, tokens.shape[1] - 1, step):
        behind = 0
        if longest is not None and start:
            behind, state = step, engine.new_state()
        part = tokens[:, start - behind : start + step + 1]
        logits, state = engine.forward(part[:, :-1], state)
        nats += float(torch.nn.functional.cross_entropy(logits[0, behind:], part[0, 1 + behind :], reduction="sum"))
    predicted = tokens.shape[1] - 1
    print(
        f"{len(text):,} characters, {predicted:,} tokens: perplexity {math.exp(nats / predicted):.3f}, "
        f"{nats / math.log(2) / len(text):.4f} bits per character"
    )


if __name__ == "__main__":
    main()
