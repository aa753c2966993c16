"""Names of foreign files that do not name a parameter of one model, and how a model resolves them.

`lora_fx.formats.components` has what files put before a name. "_" for "." cannot be undone by
itself (`a_b.c` and `a.b_c` are one text), so names stay the file's until `ForeignNames.resolve`
compares them with those of a model, both with "_" for ".".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.updates import Entry
from lora_fx.errors import LoraFxError
from lora_fx.formats.components import COMPONENTS, split_component
from lora_fx.formats.sgm_names import sgm_names
from lora_fx.targets.names import EXACT, NameRule, Names
from lora_fx.text import Json, near

Flat = tuple[str, str, str]
"""(component, module with "_" for ".", leaf) of a name."""


_ANY = ("lycoris_", "lora_")


@dataclass(frozen=True)
class ForeignNames:
    """The names of one file, which its reader puts on the adapter.

    Attributes:
        format: kohya or diffusers.
        components: Those that the file has updates of, where its keys begin with them.
    """

    format: str
    components: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """What our own JSON in a file says of it, among the metadata."""
        parts = {"components": list(self.components)} if self.components else {}
        return {"naming": self.format, **parts}

    def resolve(self, adapter: Adapter, names: Iterable[str]) -> Adapter:
        """The adapter under a model's parameter names.

        Updates of a component that the model has nothing of are left out, with a note, as long as
        another component fits.

        Args:
            adapter: The adapter under the names of the file.
            names: Those of the model's parameters; a pipeline's have the component before them.

        Raises:
            LoraFxError: A name that fits no parameter or several, or two that fit the same.
        """
        parameters = Names(names, EXACT, FLAT)
        entries: dict[str, Entry] = {}
        source: dict[str, str] = {}
        fits: set[str] = set()
        lost: dict[str, list[str]] = {}
        for key, entry in adapter.entries.items():
            hits = parameters.find(key)
            component = _component_of(key)
            if len(hits) > 1:
                raise LoraFxError(
                    f"adapter key {key!r} fits {' and '.join(map(repr, hits[:3]))}: '_' stands for "
                    "'.' in its file",
                    "rename one of the two, or take an adapter that names parameters",
                )
            if not hits:
                lost.setdefault(component, []).append(key)
                continue
            if hits[0] in entries:
                raise LoraFxError(
                    f"adapter keys {source[hits[0]]!r} and {key!r} both fit {hits[0]!r}",
                    "give the folder of the whole pipeline (model_index.json), not of one "
                    "component",
                )
            entries[hits[0]], source[hits[0]] = entry, key
            fits.add(component)
        notes = list(adapter.metadata.get("notes", []))
        for component, keys in lost.items():
            if not fits or component in fits or not component:
                raise LoraFxError(
                    f"adapter key {keys[0]!r} fits no parameter of the model",
                    near(keys[0], parameters),
                )
            notes.append(
                f"{len(keys)} updates of {component} are for another model and not applied "
                f"({keys[0]!r} …)"
            )
        return replace(
            adapter, entries=entries, metadata={**adapter.metadata, "notes": notes}, names=None
        )


def taken_names(metadata: Json) -> ForeignNames | None:
    """What `ForeignNames.to_json` put into metadata, taken out of it; None where nothing did."""
    format, components = metadata.pop("naming", None), metadata.pop("components", ())
    return ForeignNames(str(format), tuple(components)) if format else None


def _component_of(key: str) -> str:
    """The first component that a key may be of; empty where it names none."""
    read = (component for component, _, _ in _readings(key) if component)
    return split_component(key)[0] or next(read, "")


def one_model(adapter: Adapter, what: str) -> Adapter:
    """The adapter for a format that holds the updates of one model, under its own names.

    Args:
        adapter: From any file.
        what: The format, for messages.

    Raises:
        LoraFxError: Names that only a model can resolve, or updates of several components.
    """
    if adapter.names is None:
        return adapter
    parts = {split_component(key)[0] for key in adapter}
    if adapter.names.format != "diffusers" or len(parts) != 1 or "" in parts:
        key = next(iter(adapter), "")
        several = f"; it has updates of {', '.join(sorted(parts))}" if len(parts) > 1 else ""
        raise LoraFxError(
            f"{what} holds the updates of one model under its parameters' names; {key!r} is a "
            f"name of a {adapter.names.format} file{several}",
            "give the folder of the model that they are for: --base",
        )
    entries = {split_component(key)[1]: entry for key, entry in adapter.entries.items()}
    return replace(adapter, entries=entries, names=None)


def _readings(key: str) -> Iterator[Flat]:
    """Everything that a name of a file may mean."""
    module, _, leaf = key.rpartition(".")
    for component, rest in _readings_of_module(module):
        yield component, rest, leaf


def _readings_of_module(module: str) -> Iterator[tuple[str, str]]:
    flat = module.replace(".", "_")
    for name, component in COMPONENTS.items():
        for prefix in (*component.prefixes, *component.homes):
            if module.startswith(prefix):
                rest = module.removeprefix(prefix).replace(".", "_")
                for inner in (rest, rest.removeprefix(f"{name}_")):  # lora_unet_unet_
                    yield name, inner
                    yield name, inner.removeprefix("text_model_")
    for prefix in _ANY:
        if flat.startswith(prefix):
            yield "", flat.removeprefix(prefix)
    yield "", flat


def _spellings(name: str) -> Iterator[Flat]:
    """Everything by which a parameter of a model may stand in a file."""
    module, _, leaf = name.rpartition(".")
    for component, rest in _spellings_of_module(module):
        yield component, rest, leaf


def _spellings_of_module(module: str) -> Iterator[tuple[str, str]]:
    yield "", module.replace(".", "_")
    homes = [(c, h) for c, part in COMPONENTS.items() for h in part.homes if module.startswith(h)]
    for component, home in homes or [(c, "") for c in COMPONENTS]:
        rest = module.removeprefix(home)
        yield component, rest.replace(".", "_")
        if component.startswith("text_encoder"):
            yield component, rest.removeprefix("text_model.").replace(".", "_")
        elif component == "unet":
            for name in sgm_names(rest):
                yield component, name.replace(".", "_")


FLAT = NameRule(_spellings, _readings)
"""Of names of files with those of a model, both with "_" for "."; see `lora_fx.targets.names`."""
