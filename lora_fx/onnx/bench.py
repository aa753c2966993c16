"""Latency of .onnx files: interleaved sessions on the same inputs; the first file runs twice.

The default is one thread, so that the process's CPU time is the model's. Every sample is the mean
of several runs, which together last about 5 ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath

from lora_fx.compare import sizes_text
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.onnx.load import checked
from lora_fx.onnx.session import RuntimeSession, check_provider, open_session
from lora_fx.onnx.session_memory import check_sessions
from lora_fx.onnx.signature import signature
from lora_fx.onnx.timing import Sample, interleave, summary, timed
from lora_fx.progress import stage
from lora_fx.text import Json

SIZES = ((1, 8), (1, 32))
"""(batch, length) of each measurement."""
SAMPLE_SECONDS = 0.005
CONTROL = "again"


@dataclass(frozen=True)
class Timings:
    """All samples at one size.

    Attributes:
        sizes: The shapes of the inputs by name.
        repeats: The number of runs that one sample is the mean of.
        samples: Name of a model → its samples. The first model is the baseline, and the second one
            is the baseline again, as a control.
    """

    sizes: Mapping[str, tuple[int, ...]]
    repeats: int
    samples: Mapping[str, Sequence[Sample]]

    def rows(self) -> list[Json]:
        """Return one row for each model, with `cpu` and `wall` as in `summary`."""
        base = next(iter(self.samples.values()))
        base_cpu = [sample.cpu for sample in base]
        base_wall = [sample.wall for sample in base]
        rows: list[Json] = []
        for name, samples in self.samples.items():
            cpu = summary([sample.cpu for sample in samples], base_cpu)
            wall = summary([sample.wall for sample in samples], base_wall)
            rows.append({"model": name, "cpu": cpu, "wall": wall})
        return rows

    def to_json(self) -> Json:
        """Return one row of `timings[]`."""
        return {
            "sizes": {name: list(shape) for name, shape in self.sizes.items()},
            "repeats": self.repeats,
            "rows": self.rows(),
        }

    def __str__(self) -> str:
        """A table, in milliseconds."""
        width = max(map(len, self.samples))
        lines = [
            f"{sizes_text(self.sizes)} ({self.repeats} runs a sample)",
            f"  {'ms':{width}}   cpu    min  ratio  min r  95 %          wall    min  ratio",
        ]
        lines += [_table_line(row, width) for row in self.rows()]
        return "\n".join(lines)


def _table_line(row: Json, width: int) -> str:
    """Return a row of `Timings.rows` as a line of the table, with the name `width` wide."""
    cpu = row["cpu"]
    wall = row["wall"]
    interval = ""
    if cpu["lower"] is not None:
        interval = f"{cpu['lower']:.2f}-{cpu['upper']:.2f}"
    columns = [
        _aligned(cpu["median"] * 1e3, cpu["min"] * 1e3, cpu["ratio"], cpu["min_ratio"]),
        f" {interval:11}",
        _aligned(wall["median"] * 1e3, wall["min"] * 1e3, wall["ratio"]),
    ]
    return f"  {row['model']:{width}} {' '.join(columns)}"


def _aligned(*numbers: float) -> str:
    return " ".join(f"{number:6.2f}" for number in numbers)


def bench(
    files: Sequence[str | PathLike[str]],
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    inputs: Mapping[str, Array] | None = None,
    threads: int = 1,
    rounds: int = 15,
    warmup: int = 2,
    provider: str = "cpu",
) -> list[Timings]:
    """Time files against the first file; return one `Timings` for each size.

    Args:
        files: Paths of .onnx files.
        sizes: (batch, length) of dynamic dimensions; sizes that no dimension tells apart run once.
        inputs: Arrays by input name instead of sampled ones, at one size.
        threads: How many threads ONNX Runtime gets, for each session.
        rounds: How many rounds are counted.
        warmup: How many rounds before them are not.
        provider: The provider: auto, cpu, cuda or webgpu.

    Raises:
        LoraFxError: A file does not load, or does not run at a size; the provider cannot be used.
    """
    for name, value in (("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise LoraFxError(f"{name} is {value}; expected 1 or more", "pass 1 or more")
    if not files:
        raise LoraFxError("no file to measure", "pass one or more files: bench A.onnx B.onnx")
    check_provider(provider)
    for file in files:
        checked(file)
    check_sessions("timing", [files[0], *files], provider, packed=True)
    sessions = _sessions([fspath(file) for file in files], provider, threads)
    if inputs is not None:
        sizes = sizes[:1]

    timings: list[Timings] = []
    timed_shapes: list[dict[str, tuple[int, ...]]] = []
    for size in sizes:
        feeds = {name: _feeds(name, session, size, inputs) for name, session in sessions.items()}
        shapes = _shapes(next(iter(feeds.values())))
        if shapes not in timed_shapes:
            timed_shapes.append(shapes)
            timings.append(time_sessions(sessions, feeds, rounds, warmup))
    return timings


def time_sessions(
    opened: Mapping[str, RuntimeSession],
    feeds: Mapping[str, Mapping[str, Array]],
    rounds: int,
    warmup: int = 2,
    seconds: float | None = None,
) -> Timings:
    """Time sessions by name, interleaved, each on its feeds.

    `seconds` is how long a sample of the first one shall last.
    """
    shapes = _shapes(next(iter(feeds.values())))
    runs = {name: partial(session.run, feeds[name]) for name, session in opened.items()}

    seconds_of_a_run: list[float] = []
    for name, run in runs.items():
        try:
            run()  # the first one is slower
            seconds_of_a_run.append(timed(run).wall)
        except Exception as e:  # the runtime's exceptions have no common base
            shown = ", ".join(f"{key} {list(array.shape)}" for key, array in feeds[name].items())
            reason: object = e
            hint = "choose a size with --size BATCH,LENGTH, or pass real data with --inputs"
            if isinstance(e, LoraFxError):
                reason = e.message
                hint = e.hint
            raise LoraFxError(
                f"{name}: does not run at {shown}: {one_line(reason, 160)}", hint
            ) from e

    base_seconds = max(seconds_of_a_run[0], 1e-7)
    repeats = max(1, math.ceil((seconds or SAMPLE_SECONDS) / base_seconds))
    measured = {name: partial(timed, run, repeats) for name, run in runs.items()}
    with stage(f"timing at {sizes_text(shapes)}"):
        samples = interleave(measured, rounds, warmup)
    return Timings(shapes, repeats, samples)


def _shapes(feed: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feed.items()}


def _sessions(files: Sequence[str], provider: str, threads: int) -> dict[str, RuntimeSession]:
    """Open the first file twice, and the others once; equal paths get a number."""
    open_file = partial(open_session, provider=provider, threads=threads, exact=False)
    base = files[0]
    sessions = {base: open_file(base), f"{base} ({CONTROL})": open_file(base)}
    for number, path in enumerate(files[1:], 2):
        name = path
        if path in sessions:
            name = f"{path} ({number})"
        sessions[name] = open_file(path)
    return sessions


def _feeds(
    name: str, session: RuntimeSession, size: tuple[int, int], inputs: Mapping[str, Array] | None
) -> dict[str, Array]:
    """Return a session's input arrays: the user's, and sampled ones for other inputs."""
    inputs = inputs or {}
    if inputs and set(inputs).isdisjoint(session.input_names):
        raise LoraFxError(
            f"{name}: no input is named {', '.join(sorted(inputs))}",
            f"the inputs are {', '.join(session.input_names)}",
        )
    return {**signature(session).sample(size), **inputs}
