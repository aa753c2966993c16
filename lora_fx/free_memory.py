"""The memory that a process may still take, from Linux and from the limits of its container.

MemAvailable of /proc/meminfo is what the machine can give without swapping. A cgroup may allow
less: its limit minus what it uses, of which the pages of files count as free, since they go when
memory is short. Of several limits the smallest holds, those of enclosing cgroups among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FreeMemory:
    """Memory that can be taken, in bytes.

    Attributes:
        memory: What is there without swapping.
        swap: What else is there, at the speed of a disk.
    """

    memory: int
    swap: int = 0


def free_memory(root: Path = Path("/")) -> FreeMemory | None:
    """Return the memory that this process may still take; None where Linux does not tell.

    Args:
        root: The folder that holds `proc` and `sys`.
    """
    of_machine = _numbers(root / "proc/meminfo", ":")
    if "MemAvailable" not in of_machine:
        return None
    memory = of_machine["MemAvailable"] * 1024
    swap = of_machine.get("SwapFree", 0) * 1024
    for level in _levels(root):
        left = _left_of_limit(level)
        if left is not None and left < memory:
            memory = left
            swap = min(swap, _left_of_swap(level, swap))
    return FreeMemory(max(0, memory), max(0, swap))


def _levels(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's cgroups that limit memory, the innermost first.

    A container sees its own cgroup as the root of the mount, whatever its path on the machine is.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            mount = mount / "memory"
        elif controllers:
            continue
        folder = mount / path.lstrip("/")
        while folder != mount and mount in folder.parents:
            yield folder
            folder = folder.parent
        yield mount


def _left_of_limit(level: Path) -> int | None:
    """Return what a cgroup of either version may still take; None if it has no limit."""
    for limit_name, usage_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit = _number(level / limit_name)
        usage = _number(level / usage_name)
        if limit is None or usage is None:
            continue
        of_cgroup = _numbers(level / "memory.stat", " ")
        files = of_cgroup.get(f"{prefix}inactive_file", 0) + of_cgroup.get(
            f"{prefix}active_file", 0
        )
        return limit - usage + files
    return None


def _left_of_swap(level: Path, swap: int) -> int:
    """Return the swap that a cgroup may still take, if it has a limit of its own."""
    limit = _number(level / "memory.swap.max")
    usage = _number(level / "memory.swap.current")
    if limit is None or usage is None:
        return swap
    return limit - usage


def _numbers(path: Path, separator: str) -> dict[str, int]:
    """Return the lines `NAME<separator> NUMBER …` of a file; none if it cannot be read."""
    numbers = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(separator)
        number = rest.split()
        if number and number[0].isdecimal():
            numbers[name] = int(number[0])
    return numbers


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is another text, such as `max`, or no file."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
