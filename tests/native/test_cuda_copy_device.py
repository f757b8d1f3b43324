"""The CUDA layer of the copy engine over a runtime that checks its calls: right arguments, device, order and errors."""

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from native_parts import HostCopyDevice, copy_device_capsule, extra_options

from thl_engine.checkpoint.checksum import crc32c
from thl_engine.errors import DeviceError
from thl_engine.ops import native
from thl_engine.paging.reader import Reader
from thl_engine.paging.transfer import _native

ROOT = Path(__file__).parents[2]
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
if not native.available() or shutil.which("g++") is None or not (TOOLKIT / "cuda_runtime_api.h").exists():
    pytest.skip("needs the C++ extension, a C++ compiler and CUDA's headers", allow_module_level=True)

SLOT = 8192


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    made = tmp_path_factory.mktemp("cudart") / "fake.so"
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            *extra_options(),
            f"-I{ROOT / 'csrc'}",
            f"-I{TOOLKIT}",
            ROOT / "tests" / "native" / "fake_cudart.cpp",
            ROOT / "csrc" / "cuda" / "copy_device.cpp",
            "-o",
            made,
        ],
        check=True,
    )
    library = ctypes.CDLL(str(made))
    library.fake_device.restype = ctypes.c_void_p
    library.fake_begin.argtypes = library.fake_end.argtypes = [ctypes.c_void_p]
    return library


@pytest.fixture
def device(runtime):
    """The host device, and the CUDA device that ends there."""
    host = HostCopyDevice(seed=3, delay=200)
    runtime.fake_begin(host.address)
    pointer = runtime.fake_device()
    yield host, _native.CopyDevice(copy_device_capsule(pointer))
    runtime.fake_fail(0)
    runtime.fake_end(pointer)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "pages.bin"
    file.write_bytes(torch.randint(0, 256, (200_000,), dtype=torch.uint8).numpy().tobytes())
    return file


def test_every_call_reaches_the_runtime_as_it_should(path, device, runtime):
    (host, cuda), choose, content, expected = device, random.Random(4), path.read_bytes(), []
    memory = torch.zeros(4 * SLOT, dtype=torch.uint8)
    runtime.fake_capture(1)
    with Reader([path], direct=False) as reader:
        engine = _native.CopyEngine(reader.native, cuda, memory, [i * SLOT for i in range(4)], SLOT, 2, host.compute)
        for i in range(80):
            place, offset = i % 4 * SLOT, 4096 * choose.randrange(40)
            engine.start(0, offset, SLOT, crc32c(content[offset : offset + SLOT]), "page", place)
            if i >= 3:  # the oldest of four
                place = (i - 3) % 4 * SLOT
                engine.finish(place, host.compute)
                host.use(memory[place : place + SLOT])
                engine.released(place, host.compute)
            expected.append(crc32c(content[offset : offset + SLOT]))
        assert host.sums() == expected[:-3] and host.violations() == []
        assert runtime.fake_current() == 0 and runtime.fake_last() == 0  # as they were before
        del engine
        assert host.locked == 0 and host.events == 0
    runtime.fake_capture(0)
    assert _native.copy_seconds(cuda, memory, 2, 4) > 0


def test_errors_name_the_device_and_the_call(path, device, runtime):
    host, cuda = device
    memory = torch.zeros(SLOT, dtype=torch.uint8)
    with Reader([path], direct=False) as reader:
        engine = _native.CopyEngine(reader.native, cuda, memory, [0], SLOT, 2, host.compute)
        engine.start(0, 0, SLOT, None, "page", 0)
        engine.finish(0, host.compute)
        host.sums()  # the copy has ended: a device that has failed is not waited for before its memory goes
        runtime.fake_fail(700)
        with pytest.raises(DeviceError, match="^device cuda:1: CUDA: cuda[A-Za-z]*: an error as was asked for$"):
            engine.released(0, host.compute)
        with pytest.raises(DeviceError, match="^device cuda:1: "):
            for _ in range(2):
                engine.start(0, 0, SLOT, None, "page", 0)
                engine.finish(0, host.compute)
        engine.close()
