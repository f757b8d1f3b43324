"""`thl bench`: decoding against the bandwidth of the memory."""

import json
from argparse import Namespace

from thl_engine.checkpoint.store import open_store
from thl_engine.cli.modes import mode_options
from thl_engine.cli.options import engine_options
from thl_engine.engine.options import EngineOptions
from thl_engine.report.bench import benchmark, describe


def run(arguments: Namespace) -> None:
    with open_store(arguments.path) as store:
        options = mode_options(store.model_type, arguments.mode)
    found = benchmark(
        arguments.path,
        EngineOptions.of(**engine_options(arguments)),
        tokens=arguments.tokens,
        warmup=arguments.warmup,
        seed=arguments.seed,
        state_options=options,
    )
    print(json.dumps(found) if arguments.json else describe(found))
