"""Latency of .onnx files, interleaved: sessions on the same inputs, and the first one twice.

One thread unless more are asked for, so that the process's CPU time is the model's. Every sample
is the mean of so many runs that it lasts about 5 ms.
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
from lora_fx.onnx.session import RuntimeSession, open_session, signature
from lora_fx.onnx.timing import Sample, interleave, summary, timed
from lora_fx.text import Json

SIZES = ((1, 8), (1, 32))
"""(batch, length)"""
SAMPLE_SECONDS = 0.005
CONTROL = "again"


@dataclass(frozen=True)
class Timings:
    """All samples at one size: {name: [Sample, …]}; the first is the baseline, the second it again.

    `repeats` is the number of runs that one sample is the mean of.
    """

    sizes: Mapping[str, tuple[int, ...]]
    repeats: int
    samples: Mapping[str, Sequence[Sample]]

    def rows(self) -> list[Json]:
        """One row for each model, with `cpu` and `wall` as `summary` gives them."""
        first = next(iter(self.samples.values()))

        def seconds(samples: Sequence[Sample], clock: str) -> list[float]:
            return [getattr(s, clock) for s in samples]

        return [
            {"model": name}
            | {c: summary(seconds(mine, c), seconds(first, c)) for c in ("cpu", "wall")}
            for name, mine in self.samples.items()
        ]

    def to_json(self) -> Json:
        """One row of `timings[]`."""
        return {
            "sizes": {k: list(v) for k, v in self.sizes.items()},
            "repeats": self.repeats,
            "rows": self.rows(),
        }

    def __str__(self) -> str:
        """A table, in milliseconds."""
        sizes = sizes_text(self.sizes)
        wide = max(len(n) for n in self.samples)
        lines = [
            f"{sizes} ({self.repeats} runs a sample)",
            f"  {'ms':{wide}}   cpu    min  ratio  min r  95 %          wall    min  ratio",
        ]
        for row in self.rows():
            cpu, wall = row["cpu"], row["wall"]
            span = "" if cpu["lower"] is None else f"{cpu['lower']:.2f}-{cpu['upper']:.2f}"
            lines.append(
                f"  {row['model']:{wide}} {cpu['median'] * 1e3:6.2f} {cpu['min'] * 1e3:6.2f} "
                f"{cpu['ratio']:6.2f} {cpu['min_ratio']:6.2f}  {span:11} "
                f"{wall['median'] * 1e3:6.2f} {wall['min'] * 1e3:6.2f} {wall['ratio']:6.2f}"
            )
        return "\n".join(lines)


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
    """Time files against the first of them, one `Timings` a size.

    Args:
        files: Paths of .onnx files.
        sizes: (batch, length) of dynamic dimensions; sizes that no dimension tells apart run once.
        inputs: Arrays by input name instead of sampled ones, at one size.
        threads: How many threads ONNX Runtime gets, for each session.
        rounds: How many rounds are counted.
        warmup: How many rounds before them are not.
        provider: The provider: auto, cpu or cuda.

    Raises:
        LoraFxError: A file does not load, or does not run at a size.
    """
    for name, value in (("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise LoraFxError(f"{name} is {value}", "1 or more")
    if not files:
        raise LoraFxError("no file to time", "bench A.onnx B.onnx")
    for file in files:
        checked(file)
    opened = _sessions([fspath(f) for f in files], provider, threads)
    found, seen = [], set()
    for size in sizes if inputs is None else sizes[:1]:
        feeds = {n: _feeds(n, s, size, inputs) for n, s in opened.items()}
        shapes = {k: v.shape for k, v in next(iter(feeds.values())).items()}
        if tuple(shapes.items()) not in seen:
            seen.add(tuple(shapes.items()))
            found.append(time_sessions(opened, feeds, rounds, warmup))
    return found


def time_sessions(
    opened: Mapping[str, RuntimeSession],
    feeds: Mapping[str, Mapping[str, Array]],
    rounds: int,
    warmup: int = 2,
    seconds: float | None = None,
) -> Timings:
    """Time sessions by name, interleaved, each on its own feeds.

    `seconds` is how long a sample of the first one shall last.
    """
    shapes = {k: v.shape for k, v in next(iter(feeds.values())).items()}
    first, second = 0.0, math.inf
    for name, session in opened.items():
        try:
            one = [timed(partial(session.run, feeds[name])).wall for _ in range(2)]
        except Exception as e:  # the runtime's exceptions have no common base
            text = ", ".join(f"{k} {list(v.shape)}" for k, v in feeds[name].items())
            raise LoraFxError(
                f"{name}: does not run at {text}: {one_line(e, 160)}",
                "--size BATCH,LENGTH, or give real data with --inputs",
            ) from e
        if not first:
            first, second = one
    repeats = max(1, math.ceil((seconds or SAMPLE_SECONDS) / max(second, 1e-7)))
    runs = {n: partial(timed, partial(s.run, feeds[n]), repeats) for n, s in opened.items()}
    return Timings(shapes, repeats, interleave(runs, rounds, warmup))


def _sessions(files: Sequence[str], provider: str, threads: int) -> dict[str, RuntimeSession]:
    """The first file, the first again, and the others; equal paths get a number."""
    open_ = partial(open_session, provider=provider, threads=threads, exact=False)
    result = {files[0]: open_(files[0]), f"{files[0]} ({CONTROL})": open_(files[0])}
    for i, path in enumerate(files[1:], 2):
        name = f"{path} ({i})" if path in result else path
        result[name] = open_(path)
    return result


def _feeds(
    name: str, session: RuntimeSession, size: tuple[int, int], inputs: Mapping[str, Array] | None
) -> dict[str, Array]:
    given = inputs or {}
    if given and set(given).isdisjoint(session.input_names):
        raise LoraFxError(
            f"{name}: no input is named {', '.join(sorted(given))}",
            f"the inputs are {', '.join(session.input_names)}",
        )
    return {**signature(session).sample(size), **given}
