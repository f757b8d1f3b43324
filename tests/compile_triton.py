"""Compiles triton kernels for cards that need not be there: python compile_triton.py CAPABILITIES [LAUNCHES].

    compile_triton.py 75,80,86,89,90 linear attention

Launchers run on CPU tensors with a driver that names the card; each launch is compiled with exactly the types, sizes
and alignments that it has, and is not made. Prints kernels that spill registers or want more shared memory than the
card has for a block, then a summary for the card; exits with 1 where there was one.
"""

import os
import re
import subprocess
import sys
import tempfile

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


def check(capability: int, only: list[str]) -> bool:
    """Compiles all launches whose name begins with one of `only`; whether each is free of faults."""
    use(capability)
    compiled = {}
    compile_launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = compile_launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in compiled:
            compiled[kernel.hash] = fault = describe(kernel)
            if fault:
                print(f"sm_{capability} {launch} {self.__name__}: {fault}", flush=True)
        return kernel

    def describe(kernel):
        registers, stack = resources(kernel.asm["cubin"])
        if stack or kernel.metadata.shared > SHARED[capability] * 1024:
            return (f"{stack} bytes spilled, {registers} registers, {kernel.metadata.num_warps} warps, "
                    f"{kernel.metadata.shared} bytes shared")
        return None

    JITFunction.run = run
    try:
        for launch, make in LAUNCHES.items():
            if not only or launch.startswith(tuple(only)):
                make()
    finally:
        JITFunction.run = compile_launch
    faults = sum(fault is not None for fault in compiled.values())
    print(f"sm_{capability}: {len(compiled)} kernels, {faults} with faults", flush=True)
    return not faults


if __name__ == "__main__":
    cards = [int(card) for card in sys.argv[1].split(",")]
    sys.exit(0 if all([check(card, sys.argv[2:]) for card in cards]) else 1)
