"""GPUDirect Storage, with a library of the same interface in its place: what goes past the host's memory, and when."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from native_parts import HostCopyDevice

from thl_engine import CheckpointError
from thl_engine.checkpoint.checksum import crc32c
from thl_engine.ops import native
from thl_engine.paging.reader import Arena, Reader
from thl_engine.paging.transfer import NativeTransfer, Request

if not native.available() or shutil.which("gcc") is None:
    pytest.skip("needs the C++ extension and a C compiler", allow_module_level=True)

SLOT = 16384
SIZE = 40 * 4096 + 777  # the file ends inside a block


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("cufile") / "libcufile.so"
    source = Path(__file__).parent / "fake_cufile.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-D_GNU_SOURCE", "-D_FILE_OFFSET_BITS=64", source, "-o", made], check=True
    )
    return made


@pytest.fixture(scope="module")
def content():
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def path(tmp_path, content):
    file = tmp_path / "pages.bin"
    file.write_bytes(content.numpy().tobytes())
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system refuses direct reads")
    return file


class Bench(NativeTransfer):
    """A transfer over the host device with direct storage asked for."""

    def __init__(self, reader, library, monkeypatch, places=4):
        arena = Arena(places * SLOT)
        monkeypatch.setattr(torch, "empty", lambda *_, **options: arena.tensor())  # begins at a multiple of 4096
        self.host = HostCopyDevice(seed=1, delay=300)
        super().__init__(
            reader,
            [i * SLOT for i in range(places)],
            places * SLOT,
            SLOT,
            torch.device("cpu"),
            self.host,
            lambda: self.host.compute,
            direct_storage=True,
            cufile=str(library),
        )
        monkeypatch.undo()


def counts(library):
    fake = ctypes.CDLL(str(library))
    return [ctypes.c_int.in_dll(fake, name).value for name in ("reads", "files", "buffers")]


@pytest.mark.parametrize("refusal", ["", "partly"])
def test_verified_pages_go_past_the_host(path, content, library, monkeypatch, refusal):
    """First reads with a checksum go through the host and are verified; later ones into the same places do not."""
    monkeypatch.setenv("FAKE_CUFILE", refusal)
    spans = [(i * 4999 % (SIZE - 9000), 1 + i * 911 % 9000) for i in range(24)] + [(SIZE - 100, 100), (5, 0)]
    with Reader([path], direct=False) as reader, pytest.MonkeyPatch.context() as patch:
        bench, expected, through, past = Bench(reader, library, patch), [], 0, 0
        reads = counts(library)[0]
        for i, (offset, nbytes) in enumerate(spans):
            place = i % 4 * SLOT
            crc = crc32c(content[offset : offset + nbytes].numpy())
            direct = i % 3 != 0
            bench.start(Request(0, offset, nbytes, None if direct else crc, f"page {i}"), place)
            through, past = through + nbytes * (not direct), past + nbytes * direct
            bench.finish(place)
            begin = place + offset % 4096
            bench.host.use(bench.memory[begin : begin + nbytes])
            bench.released(place)
            expected.append(crc)
        assert bench.host.sums() == expected and bench.host.violations() == []
        assert (bench.bytes_copied, bench.bytes_direct) == (through, past)
        assert counts(library)[0] > reads and counts(library)[1:] == [1, 1]
        bench.close()
        assert counts(library)[1:] == [0, 0]


@pytest.mark.parametrize(
    "refusal, reason",
    [
        ("compatibility", "allow_compat_mode to false in /etc/cufile.json"),
        ("file", "pages.bin: cuFileHandleRegister: error 5008"),
        ("buffer", "cuFileBufRegister of 65536 bytes: error 5016"),
        ("driver", "driver of GPUDirect Storage does not open: error 5001"),
        ("missing", "libcufile cannot be loaded: .*nowhere.so"),
    ],
)
def test_where_it_cannot_be_used_pages_go_through_the_host(
    path, content, library, monkeypatch, tmp_path, caplog, refusal, reason
):
    monkeypatch.setenv("FAKE_CUFILE", refusal)
    if refusal == "driver":
        library = shutil.copy(library, tmp_path / "closed.so")  # a driver that is open stays open
    if refusal == "missing":
        library = tmp_path / "nowhere.so"
    with Reader([path], direct=False) as reader, pytest.MonkeyPatch.context() as patch:
        with caplog.at_level(logging.INFO, "thl_engine"):
            bench = Bench(reader, library, patch)
        assert len(caplog.records) == 1 and caplog.text.count("\n") == 1
        assert re.search(f"GPUDirect Storage is not used: .*{reason}", caplog.text)
        bench.start(Request(0, 0, 5000, None, "page"), 0)
        bench.finish(0)
        bench.host.sums()
        assert torch.equal(bench.memory[:5000], content[:5000]) and bench.bytes_direct == 0
        bench.close()


def test_a_failed_read_names_the_page(path, library, monkeypatch):
    with Reader([path], direct=False) as reader, pytest.MonkeyPatch.context() as patch:
        bench = Bench(reader, library, patch)
        bench.start(Request(0, SIZE - 50, 100, None, "page 1"), 0)
        with pytest.raises(
            CheckpointError,
            match="pages.bin: page 1: 100 bytes at offset 164567: short read: expected "
            "100 bytes, got 50; is the file truncated",
        ):
            bench.finish(0)
        bench.start(Request(3, 0, 100, None, "page 2"), 0)
        with pytest.raises(ValueError, match="file 3 is not one of the 1 files"):
            bench.finish(0)
        monkeypatch.setenv("FAKE_CUFILE", "read")
        bench.start(Request(0, 0, 100, None, "page 3"), SLOT)
        with pytest.raises(CheckpointError, match="page 3: 100 bytes at offset 0: cuFileRead: Input/output error"):
            bench.finish(SLOT)
