"""Files that are replaced: as a whole, one writer not in another's way, and nothing left of those that are killed."""

import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from thl_engine.errors import CheckpointError
from thl_engine.files import remove_left_over, replacing, write_file

WRITER = """
import os, sys, time
from pathlib import Path
from thl_engine.files import replacing
with replacing(Path(sys.argv[1]), 10) as descriptor:
    os.write(descriptor, b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing `file`."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_what_a_killed_writer_left_goes_with_the_next(
    tmp_path: Path, writer: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    (left,) = os.listdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        write_file(file, b"whole")  # while the other one writes
        assert sorted(os.listdir(tmp_path)) == [left, "file"] and not caplog.records
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert sorted(os.listdir(tmp_path)) == [left, "file"] and file.read_bytes() == b"whole"
        write_file(tmp_path / "other", b"")  # of another name: not its business
        assert left in os.listdir(tmp_path)
        write_file(file, b"again")
    assert sorted(os.listdir(tmp_path)) == ["file", "other"] and file.read_bytes() == b"again"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{file}: removed {left}, 4 B that a killed writer left"


def test_writers_of_one_process_are_not_in_each_others_way(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replacing(file, 1) as first:
        os.write(first, b"first")
        write_file(file, b"second")
        assert file.read_bytes() == b"second"
    assert file.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_foreign_files_stay(tmp_path: Path) -> None:
    names = [".file.partial", ".file.0123456.partial", ".file.0123456g.partial", "file.01234567.partial"]
    names += [".file.01234567.partial2", ".other.01234567.partial", "x.file.01234567.partial", ".file.01234567.PARTIAL"]
    for name in names:
        (tmp_path / name).write_text("precious")
    (tmp_path / ".file.00000001.partial").mkdir()
    (tmp_path / ".file.00000002.partial").symlink_to(tmp_path / names[0])
    os.mkfifo(tmp_path / ".file.00000003.partial")
    if os.geteuid() == 0:
        (tmp_path / ".file.00000004.partial").write_text("another's")
        os.chown(tmp_path / ".file.00000004.partial", 12345, -1)
    before = sorted(os.listdir(tmp_path))
    remove_left_over(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / ".file.0123abcd.partial").write_text("left")
    remove_left_over(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == before
    remove_left_over(tmp_path / "absent" / "file")


def test_a_name_of_special_characters_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / ".fxle.00000001.partial").write_text("another's")
    (tmp_path / ".f.le.00000001.partial").write_text("left")
    remove_left_over(tmp_path / "f.le")
    assert os.listdir(tmp_path) == [".fxle.00000001.partial"]


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    (tmp_path / ".file.00000001.partial").write_text("who knows whose")
    write_file(tmp_path / "file", b"whole")
    assert sorted(os.listdir(tmp_path)) == [".file.00000001.partial", "file"]


def test_one_that_was_taken_for_left_over_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer may see a new file before it is locked: it holds the lock, or has removed the file by then."""
    flock, tries = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        tries.append(descriptor)
        if len(tries) == 1:
            raise BlockingIOError
        if len(tries) == 2:
            for name in os.listdir(tmp_path):
                os.unlink(tmp_path / name)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_file(tmp_path / "file", b"whole")
    assert len(tries) == 3 and os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"whole"


def test_failures_leave_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_file(file, b"precious")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((CheckpointError, KeyboardInterrupt)), replacing(file, 4) as descriptor:
            os.write(descriptor, b"half")
            raise error
        assert file.read_bytes() == b"precious" and os.listdir(tmp_path) == ["file"]


def test_every_file_has_the_mode_that_the_process_asks_for(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
