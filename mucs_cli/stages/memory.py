"""How much memory is left, so that a stage that needs too much says so before it starts."""

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
"""Of the process's own container, where there is one."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [size for size in (free_of_machine(), free_of_container()) if size is not None]
    return min(known, default=None)


def free_of_machine(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """``MemAvailable`` of Linux, in bytes."""
    try:
        lines = meminfo.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def free_of_container(folder: Path = CGROUP) -> int | None:
    """What a version 2 control group may still take, in bytes; None without a limit."""
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
