"""What a process may have, with pretended machines and containers."""

import os
from pathlib import Path

import pytest

from thl_engine import limits

GIB = 1 << 30


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """The system's files, with `cgroup` as the process's own list of groups."""

    def use(cgroup: str) -> Path:
        read = Path.read_text

        def own(self: Path, *given, **options) -> str:
            return cgroup if self == Path("/proc/self/cgroup") else read(self, *given, **options)

        monkeypatch.setattr(Path, "read_text", own)
        monkeypatch.setattr(limits, "CGROUPS", tmp_path)
        monkeypatch.setattr(limits, "_machine_memory", lambda: 64 * GIB)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
        return tmp_path

    return use


def test_without_limits(pretend):
    pretend("0::/user\n")
    assert (limits.free_memory(), limits.processors()) == (64 * GIB, 16)


def test_the_least_limit_of_the_groups_around(pretend):
    root = pretend("0::/a/b\n")
    write(root, cgroup__controllers="memory cpu")
    write(
        root / "a",
        memory__max=4 * GIB,
        memory__current=3 * GIB,
        memory__stat=f"inactive_file {GIB}",
        cpu__max="max 100000",
    )
    write(root / "a/b", memory__max="max", memory__high=8 * GIB, memory__current=GIB, cpu__max="250000 100000")
    assert (limits.free_memory(), limits.processors()) == (2 * GIB, 2)


def test_version_1(pretend):
    root = pretend("5:memory:/c\n4:cpu,cpuacct:/c\n0::/\n")
    stat = f"cache 5\ntotal_inactive_file {GIB}"
    write(root / "memory/c", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=2 * GIB, memory__stat=stat)
    write(root / "memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=9 * GIB)
    write(root / "cpu,cpuacct/c", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    assert (limits.free_memory(), limits.processors()) == (2 * GIB, 1)


def test_inside_a_container_the_root_counts(pretend):
    root = pretend("0::/system.slice/docker-123\n")
    write(root, cgroup__controllers="memory", memory__max=GIB, memory__current=2 * GIB, memory__stat="broken")
    assert limits.free_memory() == 0


@pytest.mark.parametrize("content", ["", "nonsense", "0::/../../etc\n", "7:memory\n"])
def test_nonsense_limits_nothing(pretend, content):
    pretend(content)
    assert limits.free_memory() == 64 * GIB
