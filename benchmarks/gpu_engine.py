"""The engine on a GPU: pager alone, models at their real sizes within 4 GiB, THL beside its published algorithm.

    python benchmarks/gpu_engine.py STAGE [--rows FILE] [--scratch FOLDER] [--rehearse]

STAGE is pager, reference or a model of gpu_models. Checkpoints are random int8 weights that `init_checkpoint` writes to
the scratch folder once. `--rehearse`, with TRITON_INTERPRET=1: tiny models on the CPU under triton's interpreter, whose
figures say nothing.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from gpu_models import MODELS, THL_DEFAULT, TINY, TINY_THL, Model
from gpu_report import BUDGET, CODE_BYTES, PUBLISHED_TOKENS, Rows, check, row
from gpu_timing import Timer
from record import ROOT
from thl_as_published import PublishedTHL

from thl_engine import Engine
from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.checkpoint.page import extent
from thl_engine.checkpoint.store import open_store
from thl_engine.config import parse_config
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import divide_memory
from thl_engine.models import architecture
from thl_engine.ops.backends import load_ops
from thl_engine.paging.paged_weights import load_vectors
from thl_engine.paging.pager import Pager
from thl_engine.paging.reader import Reader
from thl_engine.report import bandwidth, bench

PAGER_MODEL = {"vocab_size": 8192, "embedding_dim": 8192, "tier_dims": [8192] * 3, "value_dim": 8192}  # 2 GB
PAGER_SLOTS, PAGER_PASSES = 16, 5
PUBLISHED_STEPS = 192  # three periods of the clocks
POLL_SECONDS = 2e-3


class Run:
    """What the stages share: device, rows, and where checkpoints lie."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.real, self.scratch = not given.rehearse, scratch
        self.device = "cuda" if self.real else "cpu"
        self.options = {"device": self.device, "backend": "triton"}
        self.rows, self.timer = Rows(given.rows, given.rehearse), Timer(self.device)
        if given.rehearse:
            bandwidth.BUFFER_BYTES, bandwidth.PRODUCT_SHAPE, bandwidth.PRODUCT_SECONDS = 1 << 16, (64, 128), 0.0
            bandwidth.DISK_BYTES, bandwidth.DISK_SECONDS = 1 << 20, 0.1

    def checkpoint(self, name: str, model_type: str, config: dict, folder: Path | None = None) -> Path:
        """A random int8 checkpoint, written where it is not there yet."""
        path = (folder or self.scratch) / f"{name}{'' if self.real else '-tiny'}.safetensors"
        if not path.exists():
            started = time.perf_counter()
            init_checkpoint(model_type, config, path, quantize="int8")
            self.rows.add(
                row(
                    f"{name}: writing the checkpoint, {path.stat().st_size / 1e9:.2f} GB",
                    time.perf_counter() - started,
                    "s",
                )
            )
        return path

    @contextmanager
    def device_memory(self) -> Iterator[list[int]]:
        """Bytes by which the device's memory in use grows meanwhile, at most, as its driver counts them."""
        grown, done = [0], threading.Event()
        if not self.real:
            yield grown
            return
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]

        def poll() -> None:
            while not done.wait(POLL_SECONDS):
                grown[0] = max(grown[0], before - torch.cuda.mem_get_info()[0])

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield grown
        finally:
            done.set()
            thread.join()
            grown[0] = max(grown[0], before - torch.cuda.mem_get_info()[0])


def pager(run: Run) -> None:
    """Streams a model through the ring without computing, beside copies from page-locked memory.

    The file lies in memory (/dev/shm) where there is room, so that the disk does not bound the figure.
    """
    memory = Path("/dev/shm")
    inside = run.real and memory.is_dir() and os.statvfs(memory).f_bavail * os.statvfs(memory).f_frsize > 5 << 30
    with tempfile.TemporaryDirectory(dir=memory if inside else run.scratch) as folder:
        path = run.checkpoint("pager", "thl", PAGER_MODEL if run.real else TINY_THL, Path(folder))
        with open_store(path) as store:
            link = run.timer.link_bandwidth()
            run.rows.add(row("page-locked host memory to the device", link / 1e9, "GB/s"))
            source = bandwidth.disk_bandwidth(store)
            run.rows.add(
                row(f"reading the file alone, from {'memory' if inside else 'the disk'}", source / 1e9, "GB/s")
            )
            rate = _streaming_rate(run, store)
            run.rows.add(
                row(
                    "pager, streaming only",
                    rate / 1e9,
                    "GB/s",
                    ceiling=link / 1e9,
                    of="GB/s, page-locked copy",
                    target="pager",
                )
            )
            run.rows.add(
                row(
                    "pager, beside the slower of reading and copying",
                    rate / 1e9,
                    "GB/s",
                    ceiling=min(link, source) / 1e9,
                    of="GB/s",
                )
            )


def _streaming_rate(run: Run, store) -> float:
    device = torch.device(run.device)
    schedule, _ = divide_memory(store, load_ops("triton", run.device), device, EngineOptions(stream=True))
    names = [name for name, tensor in store.tensors.items() if tensor.kind == "matrix"]
    pages = [page for name in names for page in store.tensors[name].pages]
    slot = max(extent(page)[1] for page in pages)
    future = [page.index for page in pages]

    def forever() -> Iterator[int]:
        while True:
            yield from future

    with Reader(store.files, direct=True) as reader:
        paged = Pager(store, reader, load_vectors(store, device), (), PAGER_SLOTS, slot, 2 * len(future), device)

        def one_pass() -> None:
            paged.begin("pass", forever)
            for name in names:
                for _ in paged.parts(name):
                    pass
            paged.end("pass")

        def passes() -> None:
            for _ in range(PAGER_PASSES):
                one_pass()

        one_pass()
        seconds = run.timer.eager_seconds(passes, 3)
        paged.close()
    return PAGER_PASSES * sum(page.nbytes for page in pages) / seconds


def engine(run: Run, name: str) -> None:
    """A model within the budget: memory by the driver, bits, and speed beside the plan."""
    model, tiny = MODELS[name], TINY[name]
    path = run.checkpoint(name, *(model if run.real else tiny)[:2])
    used = model if run.real else tiny
    budget = BUDGET if run.real else _least_budget(run, path, used)
    with run.rows.case(f"{name}: memory"):
        _decode_tokens(run, run.checkpoint(f"{name}-tiny", *tiny[:2]), tiny, stream=False)  # loads context and kernels
        with run.device_memory() as grown:
            streamed, stats = _decode_tokens(run, path, used, memory_budget=budget)
        run.rows.add(
            row(
                f"{name}: growth of the device's memory by its driver",
                grown[0] / (1 << 20),
                "MiB",
                ceiling=(BUDGET + CODE_BYTES) / (1 << 20),
                of="MiB: the budget, and 64 for kernels' code",
                target="memory",
                note=f"engine's own count {stats['peak_device_bytes'] / (1 << 20):.0f} MiB, "
                f"plan {stats['peak_memory_bytes'] / (1 << 20):.0f} MiB",
            )
        )
        if not run.real or torch.cuda.mem_get_info()[0] > 1.5 * path.stat().st_size:
            resident, _ = _decode_tokens(run, path, used, stream=False)
            run.rows.add(
                check(
                    f"{name}: streamed equals resident bit for bit",
                    all(map(torch.equal, streamed, resident)),
                    f"{len(streamed)} tokens' logits",
                )
            )
    with run.rows.case(f"{name}: speed"):
        found = bench.benchmark(
            path,
            EngineOptions.of(memory_budget=budget, **run.options, **used.options),
            tokens=used.tokens,
            warmup=16 if run.real else 2,
        )
        _speed(run, name, found)


def _least_budget(run: Run, path: Path, model: Model) -> int:
    with Engine.from_pretrained(path, stream=True, **run.options, **model.options) as opened:
        return opened.plan().least_budget


def _decode_tokens(run: Run, path: Path, model: Model, **options) -> tuple[list[torch.Tensor], dict]:
    """Logits after a prompt and of each token after it, and the engine's counters."""
    generator = torch.Generator().manual_seed(1)
    with Engine.from_pretrained(path, **run.options, **model.options, **options) as opened:
        prompt, tokens = (40, 24) if run.real else (3, 2)
        ids = torch.randint(opened.config.vocab_size, (1, prompt + tokens), generator=generator)
        logits, state = opened.prefill(ids[:, :prompt], opened.new_state())
        out = [logits.cpu()]
        for i in range(prompt, prompt + tokens):
            out.append(opened.step(ids[:, i], state)[0].cpu())
        return out, opened.stats()


def _speed(run: Run, name: str, found: dict) -> None:
    speed = found["tokens_per_second"]
    streamed = f"{found['bytes_streamed_per_token'] / 1e6:.0f} MB a token streamed"
    run.rows.add(
        row(
            f"{name}: decoding within 4 GiB",
            speed,
            "tokens/s",
            ceiling=found["predicted_tokens_per_second"],
            of="tokens/s, the plan's limit",
            target="plan",
            note=f"{found['bytes_per_token'] / 1e6:.0f} MB a token, {streamed}",
        )
    )
    if name == "thl-7b":
        run.rows.add(
            row(
                f"{name}: beside its authors' figure",
                speed,
                "tokens/s",
                ceiling=PUBLISHED_TOKENS,
                of="tokens/s, their 12 GB card",
                target="published figure",
            )
        )
    run.rows.add(
        row(
            f"{name}: a token late in the run",
            found["latency_last_quarter"] * 1e3,
            "ms",
            ceiling=found["latency_first_quarter"] * 1e3,
            of="ms, early",
            target="flat",
        )
    )
    for what, key in (("products", "product_bandwidth"), ("disk", "disk_bandwidth"), ("link", "link_bandwidth")):
        if found[key]:
            run.rows.add(row(f"{name}: bandwidth of {what}", found[key] / 1e9, "GB/s"))


def reference(run: Run) -> None:
    """THL beside its published algorithm on the same device, and all models' numbers beside the CPU's."""
    with run.rows.case("THL default beside its published algorithm"):
        config = THL_DEFAULT if run.real else TINY_THL
        path = run.checkpoint("thl-default", "thl", config)
        steps = PUBLISHED_STEPS if run.real else 4
        ours = bench.benchmark(
            path, EngineOptions(stream=False, **run.options), tokens=steps, warmup=16 if run.real else 1
        )
        theirs = 1.0 / _published_seconds(run, config, steps)
        run.rows.add(row("THL default as published, eager torch, float32", theirs, "tokens/s"))
        run.rows.add(
            row(
                "THL default, resident",
                ours["tokens_per_second"],
                "tokens/s",
                ceiling=theirs,
                of="tokens/s, its published algorithm",
                target="published implementation",
            )
        )
    sys.path.append(str(ROOT / "tests"))
    from test_streaming import MODELS as CASES
    from test_streaming import configured

    for model in CASES if run.real else ["thl"]:
        for quantize in ("none", "int8"):
            kind = "float32" if quantize == "none" else "int8"
            what = f"{model}, {kind} weights: logits of {run.device} and of the CPU's native kernels"
            with run.rows.case(what):
                config, weights = configured(model)
                found, wanted = (
                    _logits(model, config, weights, quantize, **options)
                    for options in (run.options, {"device": "cpu", "backend": "native"})
                )
                error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
                run.rows.add(
                    row(
                        what,
                        error,
                        "largest error over largest logit",
                        target="agreement" if quantize == "none" else None,
                    )
                )


def _published_seconds(run: Run, config: dict, steps: int) -> float:
    parsed, model = parse_config(config, "thl"), architecture("thl")
    weights = {
        block.name: model.initial(parsed, block, slice(0, block.shape[0]), torch.Generator().manual_seed(0)).to(
            run.device
        )
        for block in model.blocks(parsed)
    }
    published = PublishedTHL(parsed, weights)
    state, tokens = published.new_state(), torch.randint(parsed.vocab_size, (steps + 16, 1)).to(run.device)
    for column in tokens[:16]:
        published.step(column, state)
    run.timer.wait()
    started = time.perf_counter()
    for column in tokens[16:]:
        published.step(column, state)
        run.timer.wait()
    return (time.perf_counter() - started) / steps


def _logits(model: str, config: dict, weights: dict, quantize: str, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    with Engine.from_state_dict(model, config, weights, quantize=quantize, **options) as opened:
        tokens = torch.randint(opened.config.vocab_size, (1, 9), generator=generator)
        logits, state = opened.prefill(tokens, opened.new_state())
        out = [opened.forward(tokens)[0], logits]
        for _ in range(3):
            out.append(opened.step(tokens[:, 0], state)[0])
        return [value.cpu() for value in out]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["pager", "reference", *MODELS])
    parser.add_argument("--rows", type=Path, help="append each row as a line of JSON")
    parser.add_argument("--scratch", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = given.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        run = Run(given, scratch)
        stages = {"pager": pager, "reference": reference}
        with run.rows.case(given.stage):
            stages[given.stage](run) if given.stage in stages else engine(run, given.stage)
    return int(run.rows.failed)


if __name__ == "__main__":
    sys.exit(main())
