"""INL: what it changes that in step-wise decoding each token stops its integrators by itself.

    python benchmarks/stopping.py CHECKPOINT TEXT --out FILE [--thresholds 0.001 0.1]

`forward` follows the published rule, by which all positions of a layer stop together; `step` stops each token by the
same threshold. Both read the same windows of the text, one window a `forward`, with float32 weights and native kernels;
the recorded cases' tokens come first. Differences of logits are relative to the largest logit of `forward`.

`beyond, layer 0`: how far `forward` moves a token after the step at which it would have stopped by itself, for each
such step, over the threshold. In the first layer both rules start from the same values.

The model of benchmarks/results/inl-stopping.json, whose configuration stands there, was trained by

    thl train --model-type inl --config inl.json --data shakespeare.txt --out inl --tokenizer-type char --threads 1
        --steps 1800 --batch-size 4 --chunk 128 --warmup 50 --dropout 0 --weight-dropout 0 --evaluate-every 450
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from record import ROOT, rounded, write_report
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from thl_engine import Engine
from thl_engine.train.data import read_text, split_text

RECORDED = {"full_forward_early": "input_ids", "greedy": "output_ids"}  # and where a case keeps its tokens


def compare(engine: Engine, batches: Sequence[Tensor]) -> tuple[dict, tuple[float, float]]:
    """Figures over int64 [B, T] batches, each of them one `forward`; mean nats of a token by `forward` and `step`."""
    layers, threshold = engine.config.num_layers, engine.config.adaptive_convergence_threshold
    names = [f"layer{i}.iterations_used" for i in range(layers)]
    steps = [f"layer{i}.steps_taken" for i in range(layers)]
    largest = worst = total = same = nats_together = nats_alone = beyond = 0.0
    used_together, used_alone, count, predicted = torch.zeros(layers), torch.zeros(layers), 0, 0
    for tokens in batches:
        with engine.trace("layer0.x_final", *steps) as trace:
            together, _ = engine.forward(tokens)
        (whole,) = trace.steps
        state = engine.new_state(len(tokens))
        with engine.trace("layer0.x_final", *names) as trace:
            alone = torch.stack([engine.step(column, state)[0] for column in tokens.unbind(1)], dim=1)
        used = torch.stack([torch.stack([step[name] for step in trace.steps], dim=1) for name in names])  # [L, B, T]
        x = torch.stack([step["layer0.x_final"] for step in trace.steps], dim=1).flatten(0, 1)
        more = whole["layer0.steps_taken"] - used[0].flatten()
        moved = torch.linalg.vector_norm(whole["layer0.x_final"] - x, dim=1) / (more * threshold)
        beyond = max([beyond, *moved[more > 0].tolist()])
        error = (alone - together).abs()
        largest, worst = max(largest, float(together.abs().max())), max(worst, float(error.max()))
        total += float(error.sum()) / error.shape[-1]
        same += int((alone.argmax(-1) == together.argmax(-1)).sum())
        nats_together += _nats(together, tokens)
        nats_alone += _nats(alone, tokens)
        used_together += tokens.numel() * torch.tensor([float(whole[name]) for name in steps])
        used_alone += used.flatten(1).sum(dim=1)
        count, predicted = count + tokens.numel(), predicted + tokens[:, 1:].numel()
    figures = {
        "threshold": threshold,
        "tokens": count,
        "largest difference": rounded(worst / largest),
        "mean difference": rounded(total / count / largest),
        "same likeliest token": rounded(same / count),
        "steps at most": engine.config.num_iterations_per_layer,
        "steps, forward": [rounded(value) for value in (used_together / count).tolist()],
        "steps, step-wise": [rounded(value) for value in (used_alone / count).tolist()],
        "beyond, layer 0": rounded(beyond),
    }
    return figures, (nats_together / predicted, nats_alone / predicted)


def _nats(logits: Tensor, tokens: Tensor) -> float:
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))


def recorded(name: str) -> dict:
    """Figures of a recorded case, whose weights are random: nothing is said about its bits."""
    folder = ROOT / "tests" / "fixtures" / "inl" / name
    config = json.loads((folder / "config.json").read_text())["config"]
    with Engine.from_state_dict(
        "inl", config, load_file(folder / "weights.safetensors"), device="cpu", backend="native", stream=False
    ) as engine:
        return compare(engine, [load_file(folder / "io.safetensors")[RECORDED[name]]])[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--thresholds", type=float, nargs="+", help="in place of the checkpoint's own")
    parser.add_argument("--windows", type=int, default=32, help="spread over the held-out text (default: 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window (default: 128)")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the text, at its end (default: 0.1)")
    given = parser.parse_args(argv)

    report = {f"recorded, {name}": recorded(name) for name in RECORDED}
    with Engine.from_pretrained(
        given.checkpoint, device="cpu", backend="native", quantize="none", stream=False
    ) as engine:
        _, text = split_text(read_text(given.text), given.held_out)
        tokens = torch.tensor(engine.tokenizer.encode(text))
        if len(tokens) <= given.length:
            parser.error(f"the held-out text has {len(tokens)} tokens; --length must be less")
        starts = torch.linspace(0, len(tokens) - given.length, given.windows).long()
        windows = [tokens[start : start + given.length][None] for start in starts.tolist()]
        per_character = len(tokens) / len(text) / math.log(2)
        own = engine.config
        for threshold in given.thresholds or [own.adaptive_convergence_threshold]:
            engine._passes.config = replace(own, adaptive_convergence_threshold=threshold)
            figures, nats = compare(engine, windows)
            bits = [value * per_character for value in nats]
            report[f"trained, threshold {threshold:g}"] = {
                **figures,
                "bits per character, forward": rounded(bits[0]),
                "bits per character, step-wise": rounded(bits[1]),
                "difference in bits": rounded(bits[1] - bits[0]),
            }
    for title, figures in report.items():
        print(title, *(f"  {name}: {value}" for name, value in figures.items()), sep="\n")
    arguments = [given.checkpoint.name, given.text.name, "--out", given.out.name]
    if given.thresholds:
        arguments += ["--thresholds", *(f"{value:g}" for value in given.thresholds)]
    write_report(given.out, arguments, config=own.to_dict(), **report)


if __name__ == "__main__":
    main()
