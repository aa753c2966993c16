"""The memory that is free: of the machine, and under the limits of cgroups of both versions."""

from __future__ import annotations

from pathlib import Path

from lora_fx.free_memory import FreeMemory, free_memory

GIB = 1 << 30
KIB_OF_GIB = 1 << 20


def machine(root: Path, *, swap: int = 0, cgroup: str = "0::/") -> None:
    """A machine with 8 GiB available, and a process in a cgroup."""
    write(root / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable: {8 * KIB_OF_GIB} kB\n")
    with (root / "proc/meminfo").open("a") as file:
        file.write(f"SwapFree: {swap * KIB_OF_GIB} kB\n")
    write(root / "proc/self/cgroup", f"{cgroup}\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit(folder: Path, most: str, usage: int, files: tuple[int, int] = (0, 0)) -> None:
    """A cgroup of version 2, in GiB; `files` are pages that are read and that are in use."""
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{usage * GIB}\n")
    stat = f"anon 5\ninactive_file {files[0] * GIB}\nactive_file {files[1] * GIB}\n"
    write(folder / "memory.stat", stat)


def test_a_machine_without_limits(tmp_path: Path) -> None:
    machine(tmp_path, swap=2)
    assert free_memory(tmp_path) == FreeMemory(8 * GIB, 2 * GIB)
    limit(tmp_path / "sys/fs/cgroup", "max", 3)
    assert free_memory(tmp_path) == FreeMemory(8 * GIB, 2 * GIB)


def test_elsewhere_it_is_not_known(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    write(tmp_path / "proc/meminfo", "nothing of the kind\n")
    assert free_memory(tmp_path) is None


def test_pages_of_files_are_free_in_a_container(tmp_path: Path) -> None:
    machine(tmp_path)
    limit(tmp_path / "sys/fs/cgroup", str(4 * GIB), 3, files=(1, 1))
    assert free_memory(tmp_path) == FreeMemory(3 * GIB)
    limit(tmp_path / "sys/fs/cgroup", str(4 * GIB), 5)
    assert free_memory(tmp_path) == FreeMemory(0)


def test_the_smallest_limit_of_enclosing_groups_holds(tmp_path: Path) -> None:
    machine(tmp_path, cgroup="0::/user/job")
    folder = tmp_path / "sys/fs/cgroup"
    limit(folder / "user/job", str(6 * GIB), 1)
    limit(folder / "user", str(5 * GIB), 3)
    assert free_memory(tmp_path) == FreeMemory(2 * GIB)


def test_the_first_version(tmp_path: Path) -> None:
    """Its path is that on the host, which a container does not see."""
    machine(tmp_path, swap=1, cgroup="4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/")
    folder = tmp_path / "sys/fs/cgroup/memory"
    write(folder / "memory.limit_in_bytes", f"{4 * GIB}")
    write(folder / "memory.usage_in_bytes", f"{3 * GIB}")
    write(folder / "memory.stat", f"cache 7\ntotal_inactive_file {GIB}\ntotal_active_file 0\n")
    assert free_memory(tmp_path) == FreeMemory(2 * GIB, GIB)


def test_a_group_without_swap(tmp_path: Path) -> None:
    machine(tmp_path, swap=9)
    folder = tmp_path / "sys/fs/cgroup"
    limit(folder, str(4 * GIB), 1)
    write(folder / "memory.swap.max", "0")
    write(folder / "memory.swap.current", "0")
    assert free_memory(tmp_path) == FreeMemory(3 * GIB, 0)
