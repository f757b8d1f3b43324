"""`thl quantize`, `thl convert`, `thl init` and `thl grow`: checkpoints to checkpoints."""

import sys
from argparse import Namespace
from pathlib import Path

from thl_engine.checkpoint.convert import convert_checkpoint, init_adapters, init_checkpoint, quantize_checkpoint
from thl_engine.checkpoint.growth import grow_checkpoint, growth_of
from thl_engine.cli.progress import progress_bar
from thl_engine.errors import ConfigError
from thl_engine.files import read_text


def quantize(arguments: Namespace) -> None:
    with progress_bar("quantising") as progress:
        quantize_checkpoint(arguments.source, arguments.target, arguments.bits, arguments.group_size or None, progress)
    print(arguments.target)


def convert(arguments: Namespace) -> None:
    with progress_bar("converting") as progress:
        convert_checkpoint(arguments.source, arguments.target, progress, arguments.config)
    print(arguments.target)


def init(arguments: Namespace) -> None:
    with progress_bar("writing") as progress:
        if arguments.base is not None:
            if arguments.model_type not in (None, "hrm_gemma3n"):
                raise ConfigError(f"--base: goes with --model-type hrm_gemma3n, not {arguments.model_type}")
            init_adapters(arguments.base, arguments.target, arguments.config, arguments.seed, progress)
        else:
            init_checkpoint(
                arguments.model_type,
                arguments.config,
                arguments.target,
                arguments.seed,
                arguments.quantize,
                progress=progress,
            )
    print(arguments.target)


def grow(arguments: Namespace) -> None:
    text = None if arguments.text is None else read_text(Path(arguments.text), ConfigError)
    with progress_bar("writing") as progress:
        config = grow_checkpoint(
            arguments.source,
            arguments.target,
            vocab_size=arguments.vocabulary,
            text=text,
            layers=arguments.layers,
            seed=arguments.seed,
            progress=progress,
        )
    counts = config.to_dict()
    layers = " + ".join(str(counts[name]) for name in growth_of(config).layers)
    print(f"thl: {config.vocab_size} tokens, {layers} layers", file=sys.stderr)
    print(arguments.target)
