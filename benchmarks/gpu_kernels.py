"""Every kernel of the triton backend at sizes that models have, beside the ceilings of the same card.

    python benchmarks/gpu_kernels.py [--rows FILE] [--only WORD ...] [--rehearse]

Ceilings come first: a copy within the device's memory, bytes read and written both counted, and a bfloat16 product.
Before it is timed each kernel is compared with the torch reference on fresh random inputs. Bytes are those that must
move: weights, memory or cache read once, results written once. `--rehearse`, with TRITON_INTERPRET=1: tiny sizes on the
CPU under triton's interpreter, whose times mean nothing.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_report import Rows, row
from gpu_timing import Timer
from torch import Tensor

from thl_engine.kernels.triton import attention, linear
from thl_engine.models import inl
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the norm of the reference
GEMV_SHAPES = [(4096, 4096), (11008, 4096), (12288, 12288), (12288, 36864)]
SLOT_RULE = {
    "slots": 1,
    "clip_max": 1.0,
    "theta": 0.3,
    "beta": 8.0,
    "decay": 0.9995,
    "ema_decay": 0.99,
    "stale_weight": 1.0,
    "underuse_weight": 1.0,
}


@dataclass
class Bench:
    """What the kernels of a run share. `real`: at the sizes that are given; else divided to rehearse."""

    timer: Timer
    rows: Rows
    copy: float = 0.0
    matmul: float = 0.0

    def __post_init__(self) -> None:
        self.real, self.device = self.timer.cuda, self.timer.device
        self.ops, self.reference = load_ops("triton", self.device.type), ReferenceOps()

    def size(self, value: int, tiny: int) -> int:
        return value if self.real else tiny

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def stored(self, rows: int, columns: int) -> Held:
        """Random int8 weights with a scale a row, such that products keep the size of their inputs."""
        data = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=self.device)
        return Held(data, (torch.rand(rows, device=self.device) + 0.5) / 73.0 / columns**0.5)

    def compare(self, found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Raises where a result is not the reference's."""
        for number, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
            if not error <= CLOSE[dtype]:  # NaN is not close
                raise AssertionError(f"result {number} is off the reference by {error:.2g} of its norm")

    def read(
        self, what: str, calls: Sequence[Callable[[], object]], nbytes: int, target: str | None = None, note: str = ""
    ) -> float:
        """Times calls that move so many bytes each, as a share of the copy's rate; seconds of one."""
        seconds = self.timer.seconds(calls)
        note = "; ".join(part for part in (f"{seconds * 1e6:.1f} µs", note, self.timer.note) if part)
        self.rows.add(
            row(
                what, nbytes / seconds / 1e9, "GB/s", ceiling=self.copy / 1e9, of="GB/s, copy", target=target, note=note
            )
        )
        return seconds


def ceilings(bench: Bench) -> None:
    bench.copy, bench.matmul = bench.timer.copy_bandwidth(), bench.timer.matmul_rate()
    bench.rows.add(row("copy within the device, read and written", bench.copy / 1e9, "GB/s"))
    bench.rows.add(row("bfloat16 product, 8192³", bench.matmul / 1e12, "TFLOP/s"))
    bench.rows.add(row("the smallest kernel, from a graph", bench.timer.launch_seconds() * 1e6, "µs"))


def gemv(bench: Bench) -> None:
    """int8 products of few rows, as the engine makes them."""
    for height, width in GEMV_SHAPES:
        rows, columns = bench.size(height, 24), bench.size(width, 136)
        held = [bench.stored(rows, columns) for _ in range(bench.timer.sets(rows * columns))]
        for batch in (1, 8):
            x = bench.randn(batch, columns)
            what = f"int8 GEMV {height} × {width}, batch {batch}"
            with bench.rows.case(what):
                exact = exact_product(x, held[0])
                bench.compare([bench.ops.linear(x, held[0])], [exact])
                nbytes = rows * columns + 4 * rows + 4 * batch * (rows + columns)
                bench.read(
                    what,
                    [lambda w=w, x=x: bench.ops.linear(x, w) for w in held],
                    nbytes,
                    target="int8 GEMV" if batch == 1 else None,
                )
                _twins(bench, what, x, held, exact, nbytes)


def _twins(bench: Bench, what: str, x: Tensor, held: list[Held], exact: Tensor, nbytes: int) -> None:
    """The same by triton's kernel and by the CUDA twin in the shape that is fastest."""
    from tune_kernels import forms  # which in its turn times with what this module uses

    best: dict[str, tuple[float, str, list]] = {}
    out = exact.float()
    for (name, launch), form in forms(len(x)).items():
        form(x, held[0].data, held[0].scales, out.fill_(float("nan")))
        bench.compare([out], [exact])
        calls = [lambda w=w, form=form: form(x, w.data, w.scales, out) for w in held]
        best[name] = min(
            best.get(name, (float("inf"),)),
            (bench.timer.seconds(calls), str(launch), calls),
            key=lambda found: found[0],
        )
    for name, (_, launch, calls) in best.items():
        bench.read(f"{what}, {name} alone", calls, nbytes, note=f"launched as {launch}" if name == "cuda" else "")


def exact_product(x: Tensor, w: Held) -> Tensor:
    """The product in float64, a few rows of the weights at a time."""
    pieces = zip(w.data.split(1024), w.scales.split(1024), strict=True)
    return torch.cat([x.double() @ (data.double() * scales.double()[:, None]).T for data, scales in pieces], dim=-1)


def gemm(bench: Bench) -> None:
    """int8 products of many rows: reading a prompt."""
    rows, columns, batch = (bench.size(value, tiny) for value, tiny in ((11008, 48), (4096, 136), (2048, 40)))
    held = bench.stored(rows, columns)
    for dtype in (torch.float32, torch.bfloat16):
        what = f"int8 GEMM 11008 × 4096, 2048 rows, {str(dtype).removeprefix('torch.')} activations"
        with bench.rows.case(what):
            x = bench.randn(batch, columns, dtype=dtype)
            bench.compare([bench.ops.linear(x, held)], [exact_product(x, held)], dtype)
            seconds = bench.timer.seconds([lambda x=x: bench.ops.linear(x, held)])
            bench.rows.add(
                row(
                    what,
                    2 * batch * rows * columns / seconds / 1e12,
                    "TFLOP/s",
                    ceiling=bench.matmul / 1e12,
                    of="TFLOP/s, bfloat16",
                    note=bench.timer.note,
                )
            )


def slots(bench: Bench) -> None:
    """THL's sparse read and novelty-gated write over the whole memory."""
    count, heads, k = bench.size(1024, 12), bench.size(4, 2), bench.size(4, 2)
    for width in (768, 12288):
        for batch in (1, bench.size(32, 2)):

            def state(batch: int = batch, width: int = bench.size(width, 20)) -> dict[str, Tensor]:
                memory = 0.1 * bench.randn(batch, count, width)
                ema = torch.rand(3, batch, count, device=bench.device)
                times = torch.randint(0, 100, (2, batch, count), device=bench.device)
                return {
                    "memory": memory,
                    "norms": bench.reference.slot_norms(memory),
                    "read_ema": ema[0],
                    "write_ema": ema[1],
                    "last_read": times[0],
                    "last_write": times[1],
                }

            def read(ops: ReferenceOps, query: Tensor, s: dict[str, Tensor]) -> tuple[Tensor, ...]:
                return ops.slot_read(
                    query,
                    s["memory"],
                    s["read_ema"],
                    s["last_read"],
                    100,
                    k=k,
                    capacity=None,
                    scale=0.125,
                    load_penalty=0.1,
                    decay=0.99,
                )

            def write(ops: ReferenceOps, candidate: Tensor, s: dict[str, Tensor]) -> tuple[Tensor, ...]:
                made = ops.novelty_write(
                    candidate, s["memory"], s["norms"], s["read_ema"], s["write_ema"], s["last_write"], 100, **SLOT_RULE
                )
                return made.memory, made.norms, made.write_ema, made.vector, made.gate, made.indices

            nbytes = 4 * batch * count * width
            states = [state() for _ in range(bench.timer.sets(nbytes, 128))]
            size = states[0]["memory"].shape[-1]
            for name, op, given, traffic in (
                ("top-k routing", read, bench.randn(batch, heads, size), nbytes),
                ("novelty write", write, bench.randn(batch, size), 2 * nbytes),
            ):
                _beside_torch(bench, f"{name}, 1,024 slots × {width:,}, batch {batch}", op, given, states, traffic)


def _beside_torch(
    bench: Bench, what: str, op: Callable, given: Tensor, states: list[dict[str, Tensor]], nbytes: int
) -> None:
    with bench.rows.case(what):
        copies = [{name: value.clone() for name, value in states[0].items()} for _ in range(2)]
        bench.compare(op(bench.ops, given, copies[0]), op(bench.reference, given, copies[1]))
        ours = bench.read(what, [lambda s=s: op(bench.ops, given, s) for s in states], nbytes, target="slots")
        torch_seconds = bench.timer.seconds([lambda s=s: op(bench.reference, given, s) for s in states])
        bench.rows.add(
            row(
                f"{what}, beside torch",
                torch_seconds / ours,
                "times as fast",
                target="slots beside torch",
                note=f"torch {torch_seconds * 1e6:.1f} µs, timed alike; {bench.timer.note}".rstrip("; "),
            )
        )


def decode(bench: Bench) -> None:
    """One query row over a cache of 8,192 positions, as float32, bfloat16 and int8 with a scale a row."""
    keys = bench.size(8192, 80)
    for name, heads, key_heads, width in (("Gemma-3n E4B", 8, 2, 256), ("INL-5B", 32, 32, 128)):
        for kind in ("float32", "bfloat16", "int8"):
            what = f"GQA decode, {name}: {heads} heads over {key_heads} of {width}, 8k, {kind}"
            with bench.rows.case(what):
                group = heads // key_heads
                _decode(
                    bench,
                    what,
                    group * bench.size(key_heads, 2),
                    bench.size(key_heads, 2),
                    bench.size(width, 16),
                    keys,
                    kind,
                )


def _decode(bench: Bench, what: str, heads: int, key_heads: int, width: int, keys: int, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    query = bench.randn(1, heads, 1, width, dtype=dtype)
    nbytes = 2 * key_heads * keys * width * (1 if kind == "int8" else dtype.itemsize)

    def cache() -> tuple[Tensor, Tensor | None]:
        values = bench.randn(1, key_heads, keys, width, dtype=dtype)
        if kind != "int8":
            return values, None
        scales = values.abs().amax(dim=-1) / 127
        return (values / scales[..., None]).round().to(torch.int8), scales

    def wide(values: Tensor, scales: Tensor | None) -> Tensor:
        return values.float() if scales is None else values.float() * scales[..., None]

    caches = [(cache(), cache()) for _ in range(bench.timer.sets(nbytes, 64))]

    def attend(pair: tuple) -> Tensor:
        (key, key_scales), (value, value_scales) = pair
        return attention.attention(
            query, key, value, width**-0.5, causal=True, key_scales=key_scales, value_scales=value_scales
        )

    expected = bench.reference.attention(query.float(), wide(*caches[0][0]), wide(*caches[0][1]), width**-0.5)
    bench.compare([attend(caches[0])], [expected], dtype)
    scales = 0 if kind != "int8" else 2 * key_heads * keys * 4
    bench.read(what, [lambda pair=pair: attend(pair) for pair in caches], nbytes + scales, target="GQA decode")


def feed_forward(bench: Bench) -> None:
    """SwiGLU's two int8 products and gate in one pass, one row."""
    rows, columns = bench.size(11008, 40), bench.size(4096, 136)
    what = "SwiGLU, int8 gate and up 11008 × 4096, 1 row"
    with bench.rows.case(what):
        pairs = [
            (bench.stored(rows, columns), bench.stored(rows, columns))
            for _ in range(bench.timer.sets(2 * rows * columns))
        ]
        x = bench.randn(1, columns)

        def run(pair: tuple[Held, Held]) -> Tensor:
            return linear.gated_linear(x, *(linear.Weights(w.data, w.scales) for w in pair))

        gate, up = (exact_product(x, w) for w in pairs[0])
        bench.compare([run(pairs[0])], [torch.nn.functional.silu(gate) * up])
        bench.read(what, [lambda pair=pair: run(pair) for pair in pairs], 2 * rows * (columns + 4))


def integrator(bench: Bench) -> None:
    """INL's integrator with its controller, all iterations, early stops for each token."""
    width, units, steps = bench.size(4096, 48), bench.size(inl.CONTROLLER, 16), 10
    for tokens in (1, bench.size(64, 3)):
        what = f"integrator, 4096 wide, 10 steps, {tokens} tokens"
        with bench.rows.case(what):
            held = [
                (bench.stored(units, 3 * width), bench.stored(3 * width, units))
                for _ in range(bench.timer.sets(6 * width * units, 64))
            ]
            x, context, mu = bench.randn(tokens, width), bench.randn(tokens, width), bench.randn(width)
            biases = bench.randn(units), bench.randn(3 * width)

            def run(
                ops: ReferenceOps,
                pair: tuple[Held, Held],
                x: Tensor = x,
                context: Tensor = context,
                mu: Tensor = mu,
                biases: tuple = biases,
            ) -> tuple[Tensor, Tensor]:
                made = ops.integrate(
                    x, context, pair[0], biases[0], pair[1], biases[1], mu, steps=steps, threshold=1e-3
                )
                return made.x, made.v

            bench.compare(run(bench.ops, held[0]), run(bench.reference, held[0]))
            bench.read(
                what, [lambda pair=pair: run(bench.ops, pair) for pair in held], 6 * width * units + 16 * tokens * width
            )


def tier_cell(bench: Bench) -> None:
    """A tick of a THL-7B tier: three int8 products 12288 × 36864 and the gates."""
    width, what = bench.size(12288, 40), "tier cell, 12288 wide, 1 row"
    with bench.rows.case(what):
        weights = [bench.stored(width, 3 * width) for _ in range(3)]
        biases = [bench.randn(width) for _ in range(3)]
        state, below, context = (bench.randn(1, width) for _ in range(3))

        def run(ops: ReferenceOps, state: Tensor) -> Tensor:
            return ops.gru_cell(*zip(weights, biases, strict=True), state, below, context)

        bench.compare([run(bench.ops, state.clone())], [run(bench.reference, state.clone())])
        bench.read(what, [lambda: run(bench.ops, state)], 9 * width * width, target="int8 GEMV")


def small_ops(bench: Bench) -> None:
    """Normalisations and gates, many rows, so that memory and not the launch is what takes time."""
    rows, width = bench.size(8192, 6), bench.size(4096, 72)
    weight, bias = bench.randn(width), bench.randn(width)
    pairs = [(bench.randn(rows, width), bench.randn(rows, width)) for _ in range(bench.timer.sets(8 * rows * width, 8))]
    cases: dict[str, tuple[Callable, int]] = {
        "RMSNorm of a sum": (lambda ops, a, b: (ops.add_rms_norm(a, b, weight, 1e-6),), 3),
        "LayerNorm of a sum": (lambda ops, a, b: ops.add_layer_norm(a, b, weight, bias), 4),
        "SiLU × up": (lambda ops, a, b: (ops.swiglu(a, b),), 3),
        "GELU": (lambda ops, a, b: (ops.gelu(a),), 2),
    }
    for name, (op, passes) in cases.items():
        what = f"{name}, 8192 rows of 4096"
        with bench.rows.case(what):
            bench.compare(op(bench.ops, *pairs[0]), op(bench.reference, *pairs[0]))
            bench.read(
                what, [lambda op=op, pair=pair: op(bench.ops, *pair) for pair in pairs], 4 * passes * rows * width
            )


def sampling(bench: Bench) -> None:
    """One token of 262,400 logits, chosen on the device."""
    what = "sampling, 262,400 logits, temperature 0.8, top-k 50, top-p 0.95"
    with bench.rows.case(what):
        count = bench.size(262400, 300)
        rows = [bench.randn(count) for _ in range(bench.timer.sets(4 * count))]
        likeliest = int(bench.ops.sample(rows[0], 0.5, 0.0)[0])
        if likeliest != int(rows[0].argmax()):
            raise AssertionError(f"token {likeliest} was taken for the likeliest, which is {int(rows[0].argmax())}")
        bench.read(what, [lambda x=x: bench.ops.sample(x, 0.5, 0.8, 50, 0.95) for x in rows], 4 * count)


KERNELS: dict[str, Callable[[Bench], None]] = {
    "gemv": gemv,
    "gemm": gemm,
    "slots": slots,
    "decode": decode,
    "feed_forward": feed_forward,
    "tier_cell": tier_cell,
    "integrator": integrator,
    "small_ops": small_ops,
    "sampling": sampling,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="append each row as a line of JSON")
    parser.add_argument("--only", nargs="+", default=[], help="kernels whose names contain one of these words")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    bench = Bench(Timer("cpu" if given.rehearse else "cuda"), Rows(given.rows, given.rehearse))
    ceilings(bench)
    for name, run in KERNELS.items():
        if not given.only or any(word in name for word in given.only):
            with bench.rows.case(name):
                run(bench)
            if bench.real:
                torch.cuda.empty_cache()
    return int(bench.rows.failed)


if __name__ == "__main__":
    sys.exit(main())
