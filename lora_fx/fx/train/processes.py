"""One run in several processes, by torch.distributed, as torchrun or accelerate starts them.

Every process reads the same data and takes its share of each batch. Before tensors are summed, all
processes exchange one short message that says whether each of them is well. A process that fails
sends it a last time, so that nobody waits for it, and only the first one that failed says why.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import distributed as dist

from lora_fx.errors import LoraFxError, one_line

RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
"""The variables of a process's local rank: of torchrun, then of MPI, for accelerate on CPUs."""


class Elsewhere(LoraFxError):
    """The error that another process failed, which prints the reason itself."""


@dataclass(frozen=True)
class Processes:
    """This process within a run of several, and its communication with the others."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def total(self, a: float = 0.0, b: float = 0.0) -> tuple[float, float]:
        """Return the sums of two numbers over all processes.

        Raises:
            Elsewhere: Another process failed.
        """
        if self.size == 1:
            return a, b
        codes, a, b = self._message(0, a, b)
        for rank, code in enumerate(codes):
            if code:
                raise Elsewhere(
                    f"process {rank} failed", "read the error of that process", exit_code=code
                )
        return a, b

    def _message(self, code: int, a: float, b: float) -> tuple[list[int], float, float]:
        """Return the exit code of each process (0 if it has not failed), and two sums."""
        message = torch.zeros(self.size + 2, dtype=torch.float64)
        message[self.rank], message[-2], message[-1] = code, a, b
        _together(message)
        *codes, a, b = message.tolist()
        return [int(c) for c in codes], a, b

    def failed(self, code: int) -> tuple[int, int]:
        """Tell other processes that this one failed; return (rank, code) of the first failure."""
        try:
            codes, _, _ = self._message(code, 0.0, 0.0)
        except LoraFxError:
            return self.rank, code  # they are gone
        return next((rank, c) for rank, c in enumerate(codes) if c)

    def add(self, tensors: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> None:
        """Set `like[i].grad` to the sum of `tensors[i]` over all processes.

        None counts as zero; the sum is None if every process has None.
        """
        if self.size == 1:
            return
        flat = [
            torch.zeros_like(p, dtype=torch.float32) if t is None else t.float()
            for t, p in zip(tensors, like, strict=True)
        ]
        have = torch.tensor([float(t is not None) for t in tensors], device=like[0].device)
        whole = torch.cat([*(t.flatten() for t in flat), have])
        _together(whole)
        parts = torch.split(whole, [*(p.numel() for p in like), len(like)])
        for p, part, some in zip(like, parts[:-1], parts[-1].tolist(), strict=True):
            p.grad = part.view_as(p).to(p.dtype) if some else None

    def gathered(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Gather a CPU tensor of the same shape and dtype from every process."""
        if self.size == 1:
            return [data]
        self.total()
        found = [torch.empty_like(data) for _ in range(self.size)]
        dist.all_gather(found, data)
        return found

    def same(self, what: Mapping[str, bytes]) -> None:
        """Raise if a digest is not the same in every process.

        Args:
            what: Digests of equal length by what they are of, in words.
        """
        mine = torch.tensor([list(d) for d in what.values()], dtype=torch.uint8)
        for rank, theirs in enumerate(self.gathered(mine)):
            for name, a, b in zip(what, mine, theirs, strict=True):
                if not torch.equal(a, b):
                    raise LoraFxError(
                        f"process {rank} and process {self.rank} have different {name}",
                        "build the model and read the data in the same way in each process",
                    )


ALONE = Processes()


def _together(tensor: torch.Tensor) -> None:
    try:
        dist.all_reduce(tensor)
    except RuntimeError as e:
        raise LoraFxError(
            f"another process of this run ended without an error message ({one_line(e, 120)})",
            "check whether it was killed or ran out of memory",
        ) from e


def found_processes(environ: Mapping[str, str]) -> Processes:
    """Return this process, from the variables of a launcher; ALONE without a launcher."""

    def number(names: Sequence[str], default: int) -> int:
        for name in filter(environ.__contains__, names):
            if not environ[name].isdecimal():
                raise LoraFxError(
                    f"{name} is {environ[name]!r}; expected a number",
                    "start the run with torchrun, which sets it",
                )
            return int(environ[name])
        return default

    size = number(SIZE, 1)
    if size < 2:
        return ALONE
    rank = number(RANK, -1)
    if not 0 <= rank < size:
        raise LoraFxError(
            f"a run of {size} processes, but the rank of this process is not in 0 to {size - 1}",
            "start it with torchrun, or with accelerate launch",
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise LoraFxError(
                f"a run of {size} processes, but {name} is not set",
                "start the run with torchrun, which sets it",
            )
    return Processes(rank, size, number(LOCAL, rank))


def one_by_accelerate() -> bool:
    """Whether accelerate started one process, without MPI, although several were requested."""
    return "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ


SHARDED_LAUNCHES = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}
"""Variables of accelerate launch for runs that split the model, and their options."""


def refuse_sharded_launch(environ: Mapping[str, str]) -> None:
    """Raise if a launcher asks that processes share the model: here each has the whole of it."""
    for variable, option in SHARDED_LAUNCHES.items():
        if environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise LoraFxError(
                f"accelerate launch {option} asks for a model that is split between processes, but "
                "each process of train holds the whole model",
                f"leave {option} out (accelerate's config file may set it); to split the model, "
                "call fully_shard on the module of lora_fx.insert in your own program",
            )


@contextlib.contextmanager
def processes(cuda: bool = False) -> Iterator[Processes]:
    """Connect the processes that a launcher started; yield ALONE for a single process.

    Args:
        cuda: Whether gradients lie on GPUs.

    Raises:
        LoraFxError: They cannot be connected.
        Elsewhere: Another process failed.
    """
    world = found_processes(os.environ)
    if world.size == 1:
        yield world
        return
    try:
        if cuda and world.local < torch.cuda.device_count():
            torch.cuda.set_device(world.local)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, rank=world.rank, world_size=world.size)
    except (RuntimeError, ValueError) as e:
        raise LoraFxError(
            f"process {world.rank} of {world.size} cannot reach the others: {one_line(e)}",
            "check MASTER_ADDR and MASTER_PORT, the address where they meet",
        ) from e
    try:
        yield world
        world.total()  # whether the others ended well
    except Elsewhere:
        raise
    except Exception as e:
        rank, code = world.failed(getattr(e, "exit_code", 2))
        if rank != world.rank:
            raise Elsewhere(
                f"process {rank} failed", "read the error of that process", exit_code=code
            ) from e
        raise
    finally:
        dist.destroy_process_group()
