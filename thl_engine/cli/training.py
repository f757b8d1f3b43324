"""`thl train`: the options of a training run, and the run."""

import argparse
from dataclasses import MISSING, Field, fields
from typing import Any, get_args

from thl_engine.train import TrainOptions

# Field of TrainOptions -> (placeholder, help). Types and defaults are those of the field.
HELP = {
    "model_type": ("T", "architecture: thl, inl, him or hrm"),
    "config": ("FILE", "JSON configuration of the model; vocab_size may be left out"),
    "data": ("TEXT", "UTF-8 text to learn from"),
    "out": ("DIR", "folder for the checkpoint and what --resume needs"),
    "objective": (
        "NAME",
        "what to minimise: of hrm, simple (one segment, as its trainer) or deep (all segments and "
        "halting); of him, answers (the tokens that follow) or reconstruction (those given) "
        "(default: the first; of inl and thl there is one)",
    ),
    "tokenizer": ("FILE", "tokenizer.json or character vocabulary to use; without it one is made from the text"),
    "tokenizer_type": ("KIND", "of the tokenizer that is made: bpe (byte-level) or char (default: bpe; of hrm, char)"),
    "vocab_size": ("N", "entries of the vocabulary, in place of the configuration's"),
    "steps": ("N", "updates"),
    "batch_size": ("N", "sequences read side by side"),
    "chunk": ("N", "tokens of each sequence between two updates; gradients flow so far"),
    "carry": ("N", "tokens after which a sequence starts from an empty state again"),
    "learning_rate": ("R", "peak of the learning rate"),
    "final_rate": ("SHARE", "last learning rate as a share of its peak"),
    "warmup": ("N", "updates before the peak"),
    "weight_decay": ("W", "of the matrices"),
    "clip": ("NORM", "largest norm of the gradient"),
    "dropout": ("P", "share of the features entering the output head that are zeroed"),
    "weight_dropout": ("P", "share of the weights, the head's left out, that are zeroed for a chunk"),
    "precision": ("TYPE", "of the products: float32 or bfloat16"),
    "held_out": ("SHARE", "share of the text, at its end, that is evaluated and not trained on"),
    "evaluate_every": ("N", "updates between evaluations"),
    "save_every": ("N", "updates between saves for --resume"),
    "sample_tokens": ("N", "length of the text written after an evaluation"),
    "seed": ("N", "of weights, noise and order"),
    "threads": ("N", "CPU threads"),
    "resume": (None, "continue the run in --out; options that are not given are those of that run"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of TrainOptions. What is not given has no value: a resumed run has its own."""
    for field in fields(TrainOptions):
        placeholder, about = HELP[field.name]
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=about)
            continue
        required = field.default is MISSING
        parser.add_argument(
            name,
            metavar=placeholder,
            type=_type(field),
            required=required,
            default=argparse.SUPPRESS,
            help=about if required or field.default is None else f"{about} (default: {field.default})",
        )


def run(arguments: argparse.Namespace) -> None:
    from thl_engine.train import train  # here, since it brings torch, which --help does not need

    given = vars(arguments)
    options = TrainOptions(**{field.name: given[field.name] for field in fields(TrainOptions) if field.name in given})
    best = train(options)
    print(f"{options.out}: held-out perplexity {best.perplexity:.3f}, {best.bits_per_character:.4f} bits per character")


def _type(field: Field[Any]) -> Any:
    """`int` of `int` and of `int | None`."""
    kinds = [kind for kind in get_args(field.type) if kind is not type(None)]
    return kinds[0] if kinds else field.type
