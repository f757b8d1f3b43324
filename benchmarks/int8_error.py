"""What int8 weights do to the logits of each architecture, on the recorded cases in tests/fixtures.

    python benchmarks/int8_error.py --out FILE [--models thl inl ...]

The float32 weights of each case are quantised with one scale a row and with one for each 128 inputs; their logits over
the case's tokens are compared with those of the float32 weights, native kernels both. Errors are relative to the
largest logit of float32. Recorded weights are random and narrow: where a matrix has at most 128 inputs the two layouts
are the same, and `share in groups` says how much of the int8 weights lies in wider ones. Segments (HRM) and steps (INL)
that end early are decided anew by the int8 weights, so that the error holds other numbers of them too. So are the
memory slots that THL reads and writes, which changes all that follows: `before other slots` is the largest error up to
the first token of a sequence for which they differ.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from record import ROOT, rounded, write_report
from safetensors.torch import load_file
from torch import Tensor

from thl_engine import Engine
from thl_engine.checkpoint.quant import GROUP
from thl_engine.checkpoint.spool import spool_tensors
from thl_engine.engine.options import EngineOptions

FIXTURES = ROOT / "tests" / "fixtures"
CASES = {
    "thl": ["batch3", "capacity", "slots256", "step64", "warm"],
    "inl": ["full_forward_early", "greedy"],
    "him": ["encode3", "padding_mask", "reconstruction"],
    "hrm": ["forward_n1t1", "forward_n2t2", "forward_n3t2", "forward_n6t4"],
    "hrm_text": ["causal", "prefix", "greedy_prefix"],
    "gemma3n": ["forward48", "greedy16"],
    "gemma4": ["forward33", "forward40", "greedy16"],
}
SLOTS = ("router_indices", "write_indices")
LAYOUTS = {"a scale a row": None, f"groups of {GROUP}": GROUP}


def logits(engine: Engine, meta: dict, io: dict[str, Tensor]) -> Iterator[Tensor]:
    """Logits [B, T, V] of the tokens that a case records, from the state in which it began."""
    if engine.model_type == "thl":
        first = {name.removeprefix("init."): value for name, value in io.items() if name.startswith("init.")}
        state = engine.state_from_dict(first) if first else engine.new_state(io["tokens"].shape[1])
        yield torch.stack([engine.step(column, state)[0] for column in io["tokens"]], dim=1)
    elif engine.model_type == "him":
        state = engine.new_state()
        for number, tokens in enumerate(io["input_ids"]):
            if number in meta["run"].get("reset_before", []):
                state.reset_memory()
            mask = io["attention_mask"][number] if "attention_mask" in io else None
            yield engine.forward(tokens, state, mask=mask, reconstruction=meta["kind"] == "him_reconstruction")[0]
    else:
        inputs = {"cycles": (meta["run"]["N"], meta["run"]["T"])} if engine.model_type == "hrm" else {}
        inputs |= {name: io[name] for name in ("token_type_ids",) if name in io}
        yield engine.forward(io.get("input_ids", io.get("output_ids")), **inputs)[0]


def errors(model: str, case: str) -> dict[str, dict]:
    """Figures of a recorded case for each layout of scales."""
    folder = FIXTURES / model / case
    meta, io = json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")
    weights = load_file(folder / "weights.safetensors")

    def run(quantize: str, group: int | None = None) -> tuple[Tensor, Tensor | None, float]:
        store = spool_tensors(model, meta["config"], weights, quantize, group)
        sizes = [tensor.shape for tensor in store.tensors.values() if tensor.scales]
        wide = sum(rows * width for rows, width in sizes if width > GROUP)
        with (
            Engine(store, EngineOptions(device="cpu", backend="native", stream=False)) as engine,
            engine.trace(*SLOTS) as trace,
        ):
            found = torch.cat([part.flatten(0, -2) for part in logits(engine, meta, io)])
        slots = (
            None
            if model != "thl"
            else torch.stack(
                [
                    torch.cat([step[name].sort(dim=-1).values.flatten(1) for name in SLOTS], dim=1)
                    for step in trace.steps
                ],
                1,
            )
        )
        return found, slots, wide / max(sum(rows * width for rows, width in sizes), 1)

    exact, chosen, _ = run("none")
    out = {}
    for name, group in LAYOUTS.items():
        found, slots, wide = run("int8", group)
        error = (found - exact).abs() / exact.abs().max()
        same = (found.argmax(-1) == exact.argmax(-1)).double().mean()
        out[name] = {
            "positions": len(exact),
            "largest error": rounded(float(error.max())),
            "mean error": rounded(float(error.mean())),
            "same likeliest token": rounded(float(same)),
            "share in groups": rounded(wide),
        }
        if slots is not None:
            before = ((slots != chosen).any(dim=2).cumsum(dim=1) == 0).flatten()
            out[name] |= {
                "positions before other slots": int(before.sum()),
                "before other slots": rounded(float(error[before].max())) if before.any() else None,
            }
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--models", nargs="+", choices=CASES, default=[*CASES])
    given = parser.parse_args(argv)
    found = {model: {case: errors(model, case) for case in CASES[model]} for model in given.models}
    print(f"{'model, case, layout':48}{'largest':>9}{'mean':>9}{'same token':>12}")
    for model, cases in found.items():
        for case, layouts in cases.items():
            for layout, row in layouts.items():
                print(
                    f"{f'{model}, {case}, {layout}':48}{row['largest error']:9.5f}{row['mean error']:9.5f}"
                    f"{row['same likeliest token']:12.3f}"
                )
    chosen = [] if given.models == [*CASES] else ["--models", *given.models]
    write_report(given.out, ["--out", given.out.name, *chosen], **found)


if __name__ == "__main__":
    main()
