"""The memory of ONNX Runtime's sessions, before they are made.

Weights that lie inside a file are read into memory: that is certain. Those in a data file stay in
its pages, which the system takes back when memory is short; but a session for many runs copies what
products read (see `few_runs`): expected is one copy, and none is certain.
On a GPU the runtime's own memory is not known here, and nothing is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_fx.free_memory import free_memory
from lora_fx.onnx.load import data_names
from lora_fx.onnx.session import providers
from lora_fx.peak_memory import MemoryPart, PeakMemory, check_memory
from lora_fx.text import StrPath


def check_sessions(job: str, files: Sequence[StrPath], provider: str, *, packed: bool) -> None:
    """Tell the memory of sessions that are open at one time, and refuse what cannot fit.

    Args:
        job: What opens them, as the subject of a sentence.
        files: The files, one for each session.
        provider: Where they run, as in `open_session`.
        packed: Whether they are for many runs.

    Raises:
        LoraFxError: What is certain to be needed is not there.
    """
    if provider != "cpu" and providers()[0] != "cpu":
        return
    inside = sum(Path(file).stat().st_size for file in files)
    in_data_files = sum(_bytes_of_data(Path(file)) for file in files) if packed else 0
    parts = (
        MemoryPart("weights inside files", inside, inside),
        MemoryPart("packed weights of data files", in_data_files),
    )
    check_memory(PeakMemory(job, parts), free_memory(), _ways_out)


def _ways_out(free: int) -> Iterator[str]:
    yield "smaller files: export with --quantise int4, or with --precision float16"


def _bytes_of_data(file: Path) -> int:
    """Return the size of a model's data files."""
    paths = [file.with_name(name) for name in data_names(file)]
    return sum(path.stat().st_size for path in paths)
