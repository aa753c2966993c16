"""The probe of an adapter in a file of its own, beside the adapter's weights."""

from __future__ import annotations

from pathlib import Path

from lora_fx.errors import LoraFxError, expect_file, near_path
from lora_fx.files.atomic import replacing
from lora_fx.files.read import open_input, read_bytes
from lora_fx.files.replaceable import PROBE
from lora_fx.probe.probe import MOST_BYTES, Probe


def write_probe(probe: Probe, path: Path, *, force: bool) -> None:
    """Write a probe as a JSON file.

    Raises:
        LoraFxError: The file exists and `force` is not given, or it cannot be written.
    """
    # an adapter is read with its old probe, which is no input of the new one
    with replacing(path, force=force, own=path.name == PROBE) as temporary:
        temporary.write_text(probe.to_text() + "\n", encoding="utf-8")


def read_probe(path: str) -> Probe:
    """Read the probe of an adapter.

    Args:
        path: The adapter's folder, or the file itself.

    Raises:
        LoraFxError: There is no probe, or it is damaged.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PROBE
        if not file.exists():
            raise LoraFxError(
                f"{path}: the folder has no probe ({PROBE})",
                f"make one: lora-fx probe {path} --base MODEL -o {path}",
            )
    expect_file(file, near_path(path, "pass the adapter's folder, or its probe"))
    if not _is_json(file):
        raise LoraFxError(
            f"{path}: an adapter without a folder has its probe in a file of its own",
            f"make one: lora-fx probe {path} --base MODEL -o FILE.json",
        )
    return Probe.from_text(read_bytes(file, most=MOST_BYTES + 1), str(file))


def _is_json(file: Path) -> bool:
    """Whether a file begins as an object of JSON, and not as an adapter."""
    with open_input(file) as opened:
        return opened.read(64).lstrip().startswith(b"{")
