"""`thl inspect`: what is in a checkpoint. It needs no engine, and loads none."""

import json
from argparse import Namespace

from thl_engine.checkpoint.store import open_store
from thl_engine.cli.progress import progress_bar
from thl_engine.memory import size
from thl_engine.report.summary import describe, summarise
from thl_engine.report.summary import verify as verify_pages


def run(arguments: Namespace) -> None:
    with open_store(arguments.path) as store:
        summary = summarise(store)
        if arguments.verify:
            with progress_bar("verifying") as progress:
                summary["verified_bytes"] = verify_pages(store, progress)
    if arguments.json:
        print(json.dumps(summary))
        return
    print(describe(summary))
    if arguments.verify:
        checked = summary["pages"]["checksums"]
        print(
            f"\nverified: {size(summary['verified_bytes'])} read, "
            + (f"{checked} checksums match" if checked else "the file has no checksums to compare with")
        )
