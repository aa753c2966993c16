"""The JSON in the header of files that lora-fx writes, for facts that a format cannot store.

The format's own tensors stay as every reader expects them. Under `lora_fx_names` stands, for each
update, the key that it had, its layout, use and variant, so that reading our own file gives back
the adapter that was written. Other readers pass over it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.entry_json import from_json, to_json
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, Kronecker, ReplacedRows
from lora_fx.errors import LoraFxError, check_format, one_line, stamp
from lora_fx.files.strict_json import json_object
from lora_fx.ir.layout import Layout
from lora_fx.probe import carried
from lora_fx.probe.probe import PROPERTY
from lora_fx.text import Json, JsonView

FIELD = "lora_fx_names"


def describe(adapter: Adapter, names: Mapping[str, str]) -> str:
    """Return the JSON for an adapter.

    Args:
        adapter: The adapter.
        names: Key K → the key under which a reader finds the update of K by the tensors alone, and
            which `restore` replaces by K: kohya's is the name of the module and ".weight".

    Raises:
        LoraFxError: Two updates of one name, of which the file would hold the second alone; or
            metadata is no JSON.
    """
    _check_one_update_a_name(names)
    rows = {}
    for key, entry in adapter.entries.items():
        if isinstance(entry, (Full, ReplacedRows)):
            continue  # no format that needs these names has them
        numbers: tuple[str, ...] = ()
        if isinstance(entry, LowRank):
            numbers = ("use", "variant", "alpha")
        elif isinstance(entry, Kronecker):
            numbers = ("scale",)
        rows[names[key]] = {"key": key, **to_json(entry, "layout", "extra", *numbers)}
    metadata = carried.without_probe(adapter.metadata)
    metadata.pop("notes", None)
    if adapter.names:
        metadata |= adapter.names.to_json()
    return metadata_text({**stamp(), "names": rows, "metadata": metadata})


def _check_one_update_a_name(names: Mapping[str, str]) -> None:
    """Raise for two keys under whose names a reader would find one update."""
    keys: dict[str, str] = {}
    for key, name in names.items():
        if name in keys:
            raise LoraFxError(
                f"the updates of {keys[name]!r} and {key!r} would both be {name!r} in the file",
                "merge the two updates first; if they are of two layers, save them as peft",
            )
        keys[name] = key


def probe_in_header(adapter: Adapter) -> dict[str, str]:
    """Return the field of a file's header for an adapter's probe; none without one."""
    if carried.FIELD not in adapter.metadata:
        return {}
    return {PROPERTY: adapter.metadata[carried.FIELD]}


def metadata_text(metadata: JsonView) -> str:
    """Return metadata as text for a file's header; raise LoraFxError if it cannot be JSON."""
    try:
        return json.dumps(metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LoraFxError(
            f"the adapter's metadata cannot be written as JSON: {one_line(error)}",
            "use only texts, numbers, lists and objects in metadata",
        ) from error


def restore(
    entries: Mapping[str, Entry], header: Mapping[str, str], file: str
) -> tuple[dict[str, Entry], Json, bool]:
    """Return the entries of a file under the keys that they were written from.

    Returns:
        The entries, the metadata that was written, and True when no key is the file's own name.

    Raises:
        LoraFxError: The JSON is damaged, or contradicts the tensors.
    """
    if FIELD not in header:
        return dict(entries), {}, False
    stored = json_object(header[FIELD], f"{file}: metadata {FIELD}")
    try:
        check_format(stored, f"{file}: metadata {FIELD}")
        rows = dict(stored["names"])
        metadata = dict(stored["metadata"])
        restored: dict[str, Entry] = {}
        for name, entry in entries.items():
            row = rows.get(name)
            key = name if row is None else str(row["key"])
            if key in restored:
                raise ValueError(f"{key!r} appears twice")
            restored[key] = entry if row is None else _restored(entry, row)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise LoraFxError(
            f"{file}: metadata {FIELD} does not fit the tensors: "
            f"{type(error).__name__} {one_line(error)}",
            f"the file was edited; convert it again, or remove {FIELD} from its header",
        ) from error
    return restored, metadata, all(name in rows for name in entries)


def _restored(entry: Entry, row: JsonView) -> Entry:
    """Return an update with the layout, use and variant of its row.

    Raises:
        ValueError: The row says another scale than the tensors, or a layout of other sizes.
    """
    assert not isinstance(entry, (Full, ReplacedRows))  # see describe
    restored = from_json(entry, row)
    if not math.isclose(restored.scale, entry.scale, rel_tol=1e-6):
        raise ValueError(
            f"{row['key']!r} has scale {entry.scale:g}, but {restored.scale:g} in the JSON"
        )
    if not holds(restored.layout, restored.shape):
        raise ValueError(f"{row['key']!r} is {list(restored.shape)}, which does not fit its layout")
    return restored


def holds(layout: Layout | None, shape: tuple[int, ...]) -> bool:
    """Whether a layout is valid for [*batch, out, in] of this shape, or is unknown."""
    if layout is None:
        return True
    axes = sorted(layout.batch + layout.out + layout.in_)
    return (
        axes == list(range(len(layout.shape)))
        and math.prod(layout.shape) == math.prod(layout.stored)
        and (*layout.batch_shape, layout.out_size, layout.in_size) == shape
    )
