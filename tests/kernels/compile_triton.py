"""Compiles triton kernels for cards that need not be there: python compile_triton.py CAPABILITIES [LAUNCHES].

    compile_triton.py 75,80,86,89,90 linear attention --jobs 2

Launchers run on CPU tensors with a driver that names the card; each launch is compiled with exactly the types, sizes
and alignments that it has, and is not made. Prints kernels that spill registers or want more shared memory than the
card has for a block, as read from the compiled kernels, then a summary for each card; exits with 1 where there was one.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

os.environ["TRITON_INTERPRET"] = "0"

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_launches import LAUNCHES

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}  # KiB for a block
CUOBJDUMP = os.path.join(os.path.dirname(sys.modules["triton"].__file__), "backends", "nvidia", "bin", "cuobjdump")


class Card:
    """A driver that knows which card it would drive."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack: what does not fit in registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def use(capability: int) -> None:
    """Compiles for this card from now on."""
    driver.set_active(Card(capability))
    for name, module in list(sys.modules.items()):
        if name.startswith("thl_engine.kernels.triton.") and hasattr(module, "capability"):
            module.capability = lambda x: capability


def compile_one(task: tuple[int, str]) -> dict[str, str | None]:
    """Compiles a launch for a card: hash of each of its kernels -> what is wrong with it, if anything."""
    capability, launch = task
    use(capability)
    compiled = {}
    compile_launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = compile_launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in compiled:
            compiled[kernel.hash] = describe(self.__name__, kernel)
        return kernel

    def describe(name, kernel):
        registers, stack = resources(kernel.asm["cubin"])
        if stack or kernel.metadata.shared > SHARED[capability] * 1024:
            return (
                f"sm_{capability} {launch} {name}: {stack} bytes spilled, {registers} registers, "
                f"{kernel.metadata.num_warps} warps, {kernel.metadata.shared} bytes shared"
            )
        return None

    JITFunction.run = run
    try:
        LAUNCHES[launch]()
    finally:
        JITFunction.run = compile_launch
    return compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", help="compute capabilities, such as 75,90")
    parser.add_argument("launches", nargs="*", help="those whose names begin so (default: all)")
    parser.add_argument(
        "--share",
        action="store_true",
        help="divide the launches between 86 and 89, which have the same tiles and the same limits",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a processor)")
    given = parser.parse_args()
    cards = [int(card) for card in given.cards.split(",")]
    names = [name for name in LAUNCHES if not given.launches or name.startswith(tuple(given.launches))]
    tasks = [
        (card, name)
        for card in cards
        for i, name in enumerate(names)
        if not given.share or card not in (86, 89) or card == (86, 89)[i % 2]
    ]
    found: dict[int, dict[str, str | None]] = {card: {} for card in cards}
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        for (card, _), compiled in zip(tasks, pool.map(compile_one, tasks), strict=True):
            for kernel, fault in compiled.items():
                if fault and kernel not in found[card]:
                    print(fault, flush=True)
                found[card][kernel] = fault
    for card, compiled in found.items():
        print(f"sm_{card}: {len(compiled)} kernels, {sum(map(bool, compiled.values()))} with faults")
    return int(any(fault for compiled in found.values() for fault in compiled.values()))


if __name__ == "__main__":
    sys.exit(main())
