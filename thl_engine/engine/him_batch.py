"""Prompts from a JSON file, each answered in one pass, and the answers to another: HIM's batch mode as published.

One state lasts for the whole file, in its order: the slot memory is emptied before each prompt, the reasoning buffer
is not. So an answer depends on the prompts before it, and the same file and seed give the same answers.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from thl_engine.config import HIMConfig
from thl_engine.engine.engine import Engine
from thl_engine.errors import CheckpointError, ConfigError, TokenizerError, shown
from thl_engine.files import parse_any_json, read_text, write_file
from thl_engine.models import him
from thl_engine.models.state import State
from thl_engine.text.sampler import Sampler, Sampling

PAD_ID = 1  # of the published tokenizer
PUBLISHED = Sampling(temperature=1.0, top_k=50, top_p=0.9)
PROMPT_KEYS = ("prompt", "input")


def answer_file(
    engine: Engine,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    sampling: Sampling = PUBLISHED,
    pad_id: int = PAD_ID,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Answers every sample of a JSON file and returns how many there were.

    source: a list of objects with the text under "prompt" or "input". target: the list of the same objects, with
    "output" (the answer's text) and "ids" (its tokens) added or replaced; written under another name and renamed when
    complete. `progress` is called with (samples answered, samples in all). Raises ConfigError for a file of another
    form, TokenizerError for a prompt without tokens, CheckpointError where target cannot be written.
    """
    source, target = Path(source), Path(target)
    if engine.architecture.answering != "block":
        raise ConfigError(
            f"{source}: prompts from a file are for models that answer in one pass (him); this is a "
            f"{engine.model_type} model, which takes one prompt"
        )
    if engine.tokenizer is None:
        raise TokenizerError(f"{source}: no tokenizer in or beside the checkpoint; put its tokenizer.json there")
    samples = read_samples(source)
    if target.is_dir() or not target.parent.is_dir():
        raise CheckpointError(f"{target}: expected the name of a file in an existing folder")
    if target.exists() and target.samefile(source):
        raise ConfigError(f"{target}: is the file being read; write to another name")
    sampler, state = Sampler(sampling), engine.new_state()
    results = []
    for number, (sample, prompt) in enumerate(samples):
        tokens = engine.tokenizer.encode(prompt)
        if not tokens:
            raise TokenizerError(f"{source}: sample {number} has an empty prompt; give it at least one token")
        ids, state = answer(engine, tokens, state, sampler, engine.tokenizer.eos_id, pad_id)
        results.append({**sample, "output": engine.tokenizer.decode(ids), "ids": ids})
        if progress is not None:
            progress(len(results), len(samples))
    # What is no character, half of a surrogate pair, stays the escape that it was.
    text = (json.dumps(results, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "backslashreplace")
    write_file(target, text)
    return len(results)


def answer(
    engine: Engine, tokens: Sequence[int], state: State, sampler: Sampler, eos_id: int | None, pad_id: int = PAD_ID
) -> tuple[list[int], State]:
    """The published generation: (ids up to the first `eos_id`, which is included, the state).

    The prompt is cut to its first max_seq_len tokens and always padded to that length, with the padding masked. Every
    answer position is drawn on its own, whatever was chosen before it.
    """
    assert isinstance(engine.config, HIMConfig) and isinstance(state, him.State)  # no other model answers in blocks
    length = engine.config.max_seq_len
    padded = torch.full((1, length), pad_id)
    kept = torch.tensor(tokens[:length])
    padded[0, : len(kept)] = kept
    state.reset_memory()
    logits, following = engine.forward(padded, state, mask=(torch.arange(length) < len(kept))[None])
    ids: list[int] = []
    for row in logits[0]:
        ids.append(int(engine.sample(sampler, row, ())[0]))
        if ids[-1] == eos_id:
            break
    return ids, following


def read_samples(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The objects of a samples file, each with its prompt."""
    samples = parse_any_json(read_text(path, ConfigError), str(path), ConfigError)
    if not isinstance(samples, list):
        raise ConfigError(f'{path}: holds a JSON {type(samples).__name__}, expected a list of objects with "prompt"')
    out = []
    for number, sample in enumerate(samples):
        keys = [key for key in PROMPT_KEYS if key in sample] if isinstance(sample, dict) else []
        if not keys or not isinstance(sample[keys[0]], str):
            raise ConfigError(
                f"{path}: sample {number} is {shown(sample)}, expected an object with text under "
                + " or ".join(f'"{key}"' for key in PROMPT_KEYS)
            )
        out.append((sample, sample[keys[0]]))
    return out
