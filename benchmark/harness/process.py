"""What Linux tells about processes, ports and folders."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
MIB: Final = 1024 * 1024


def cpu_seconds(pid: int) -> float:
    """User + system time of all threads of a process so far, in steps of 10 ms."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def rss_anon_mib(pid: int) -> float:
    """Resident memory that is neither a file nor shared: what the process itself made."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no RssAnon in the status of process {pid}")


def machine_busy_seconds() -> float:
    """CPU time that anybody used on this machine so far, time stolen by its host included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_SECOND


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_neighbours(count: int) -> int:
    """Return the first of `count` free ports that follow each other."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + count):
                probe = probes.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that run."""
    found = [int(text) for path in Path(f"/proc/{pid}/task").glob("*/children") for text in path.read_text().split()]
    return [one for child in found for one in (child, *children(child))]


def in_memory(folder: Path) -> bool:
    """Whether a folder is on a file system for which fsync means nothing."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [fields for fields in mounts if folder.resolve().is_relative_to(fields[1])]
    return max(inside, key=lambda fields: len(fields[1]))[2] in ("tmpfs", "ramfs")


def machine() -> str:
    """One line about the machine, for the head of the results."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB / 1024
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown processor",
    )
    uname = os.uname()
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, {uname.sysname} {uname.release}"
