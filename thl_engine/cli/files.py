"""`thl quantize`, `thl convert` and `thl init`: checkpoints to checkpoints."""

from argparse import Namespace

from thl_engine.cli.progress import progress_bar
from thl_engine.convert import convert_checkpoint, init_checkpoint, quantize_checkpoint


def quantize(arguments: Namespace) -> None:
    with progress_bar("quantising") as progress:
        quantize_checkpoint(arguments.source, arguments.target, arguments.bits, arguments.group_size or None, progress)
    print(arguments.target)


def convert(arguments: Namespace) -> None:
    with progress_bar("converting") as progress:
        convert_checkpoint(arguments.source, arguments.target, progress)
    print(arguments.target)


def init(arguments: Namespace) -> None:
    with progress_bar("writing") as progress:
        init_checkpoint(arguments.model_type, arguments.config, arguments.target, arguments.seed, arguments.quantize,
                        progress=progress)
    print(arguments.target)
