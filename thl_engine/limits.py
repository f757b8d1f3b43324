"""What the system lets this process have of memory and processors, a container's limits included.

Control groups of both versions are read where they are mounted (https://docs.kernel.org/admin-guide/cgroup-v2.html and
cgroup-v1/memory.html): the process's own group and those that it lies in, since the least limit of them holds.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2^63 where there is no limit


def free_memory() -> int:
    """Bytes that can be had now without pressing on others: what the machine has, or what the container leaves."""
    return min([_machine_memory(), *_group_memory()])


def processors() -> int:
    """Processors that the process may keep busy: those of its affinity, within its container's quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in _group_processors())]))


def _machine_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_memory() -> Iterator[int]:
    for group in _groups("memory"):
        v2 = (group / "memory.max").exists() or (group / "memory.current").exists()
        names = ("memory.max", "memory.high") if v2 else ("memory.limit_in_bytes",)
        used = _number(group / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if used is None:
            continue
        # The page cache of files counts as used, but makes room when something else needs it.
        used -= _statistic(group / "memory.stat", "inactive_file" if v2 else "total_inactive_file")
        for limit in map(_number, (group / name for name in names)):
            if limit is not None and limit < _UNLIMITED:
                yield max(0, limit - max(used, 0))


def _group_processors() -> Iterator[float]:
    for group in _groups("cpu"):
        try:
            quota, period = (group / "cpu.max").read_text().split()
        except (OSError, ValueError):
            found = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
            if found[0] is not None and found[0] > 0 and found[1]:
                yield found[0] / found[1]
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups that the process is in, the innermost first, of both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root = CGROUPS if (CGROUPS / "cgroup.controllers").exists() else CGROUPS / "unified"
        elif controller in controllers.split(","):
            root = next((CGROUPS / name for name in (controller, controllers) if (CGROUPS / name).is_dir()), CGROUPS)
        else:
            continue
        own = root / path.lstrip("/")
        # Inside a container the path may be the host's, which is not mounted here: its root is what counts then.
        inside = own if own.is_dir() and ".." not in own.parts else root
        yield from (folder for folder in (inside, *inside.parents) if folder == root or root in folder.parents)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
