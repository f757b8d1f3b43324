"""`thl plan`: what a memory budget costs."""

import json
import sys
from argparse import Namespace

from thl_engine.checkpoint.store import open_store
from thl_engine.cli.modes import mode_options
from thl_engine.cli.options import engine_options
from thl_engine.engine.options import EngineOptions
from thl_engine.report.forecast import forecast


def run(arguments: Namespace) -> None:
    options = EngineOptions.of(**engine_options(arguments))
    with open_store(arguments.path) as store:
        found = forecast(
            store,
            options,
            disk=arguments.disk_bandwidth,
            memory=arguments.memory_bandwidth,
            link=arguments.link_bandwidth,
            state_options=mode_options(store.model_type, arguments.mode),
        )
    if found.assumed:
        print(
            "thl: there is no CUDA device here: of the bandwidths of its memory and of the link, those not given are "
            "assumed",
            file=sys.stderr,
        )
    print(
        json.dumps({**found.plan.to_dict(), "backend": found.backend, "device": str(found.device)})
        if arguments.json
        else found.plan.table(("backend", f"{found.backend} on {found.device}"))
    )
