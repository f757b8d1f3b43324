"""Damaged files of training runs that are to go on."""

import io
import json
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from fuzz.kinds import SMALL, Cases, any_of, kind, parts, whole
from fuzz.mutations import damaged, edited
from fuzz.other_files import other_tensors
from safetensors.torch import load, save

from thl_engine.train.checkpoint import RECORD
from thl_engine.train.loop import prepare, train
from thl_engine.train.options import TrainOptions

TEXT = "king and queen, crown and sword; night, day, love and grief\n" * 8


def training(folder: Path, model_type: str) -> Cases:
    (folder / "text.txt").write_text(TEXT)
    (folder / "config.json").write_text(json.dumps(SMALL[model_type]))
    options = TrainOptions(
        model_type, folder / "config.json", folder / "text.txt", folder / "run", tokenizer_type="char"
    )
    options = replace(options, steps=2, batch_size=2, chunk=4, carry=8, evaluate_every=2, save_every=2, sample_tokens=1)
    with redirect_stderr(io.StringIO()):
        train(options)
    options, file = replace(options, steps=3, resume=True), folder / "run/training.safetensors"
    content, (header, data), tensors = file.read_bytes(), parts(file), load(file.read_bytes())
    metadata = header["__metadata__"]
    record = json.loads(metadata[RECORD])
    names = [*record, *record.get("options", {}), "step", "best", "origin"]

    def make(random: Random) -> bytes:
        match random.randrange(6):
            case 0:
                return damaged(random, content, 3000)
            case 1:
                return whole(edited(random, header, list(header)), data)
            case 2 | 3:
                own: Any = json.dumps(edited(random, record, names))
                return whole(header | {"__metadata__": metadata | {RECORD: own}}, data)
        return save(other_tensors(random, tensors), metadata)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        run = prepare(options)
        assert isinstance(run.step, int) and run.step >= 0
        run.update()

    return make, check


kind("training", share=2)(
    lambda folder: any_of(folder, {name: partial(training, model_type=name) for name in ("thl", "hrm")})
)
