"""Compiles every triton kernel for one card, without a GPU: python compile_triton.py CAPABILITY -> JSON lines.

Launchers run on CPU tensors with a driver that names the card; each launch is compiled with exactly the types, sizes
and alignments that it has, and is not made. Prints, for each: kernel, launch, shared bytes, registers, stack bytes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_launches import LAUNCHES

from thl_engine.kernels.triton import arithmetic

CUOBJDUMP = os.path.join(os.path.dirname(sys.modules["triton"].__file__), "backends", "nvidia", "bin", "cuobjdump")


class Card:
    """A driver that knows which card it would drive."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

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


def main(capability: int, only: list[str]) -> None:
    driver.set_active(Card(capability))
    arithmetic.capability = lambda x: capability
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("thl_engine.kernels.triton.") and hasattr(module, "capability"):
            module.capability = arithmetic.capability
    compile_launch = JITFunction.run
    seen = set()

    def run(self, *args, grid, warmup, **options):
        kernel = compile_launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            registers, stack = resources(kernel.asm["cubin"])
            if stack and os.environ.get("DUMP"):
                open(f"/tmp/exp/{self.__name__}-{launch}-{capability}-{registers}.ptx", "w").write(kernel.asm["ptx"])
            print(json.dumps({"kernel": self.__name__, "launch": launch, "shared": kernel.metadata.shared,
                              "registers": registers, "stack": stack, "warps": kernel.metadata.num_warps,
                              "tensor_cores": "mma" in kernel.asm["ptx"]}), flush=True)

    JITFunction.run = run
    for launch, make in LAUNCHES.items():
        if not only or any(launch.startswith(name) for name in only):
            make(torch)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
