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
_PREFIXES_OF_ANY_MODEL = ("lycoris_", "lora_")


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
        """The fields for it in lora-fx's JSON, among the metadata."""
        fields: Json = {"naming": self.format}
        if self.components:
            fields["components"] = list(self.components)
        return fields

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
        file_keys: dict[str, str] = {}  # parameter → key in the file
        fitting_components: set[str] = set()
        unmatched: dict[str, list[str]] = {}  # component → keys
        for key, entry in adapter.entries.items():
            matches = parameters.find(key)
            component = _component_of(key)
            if len(matches) > 1:
                raise LoraFxError(
                    f"adapter key {key!r} fits {' and '.join(map(repr, matches[:3]))}, because "
                    "its file writes '_' for '.'",
                    "rename one of the parameters, or use an adapter with parameter names as keys",
                )
            if not matches:
                unmatched.setdefault(component, []).append(key)
                continue
            parameter = matches[0]
            if parameter in entries:
                raise LoraFxError(
                    f"adapter keys {file_keys[parameter]!r} and {key!r} both fit {parameter!r}",
                    "give the folder of the whole pipeline (model_index.json), not of one "
                    "component",
                )
            entries[parameter] = entry
            file_keys[parameter] = key
            fitting_components.add(component)

        notes = list(adapter.metadata.get("notes", []))
        for component, keys in unmatched.items():
            is_of_another_model = component and component not in fitting_components
            if not fitting_components or not is_of_another_model:
                raise LoraFxError(
                    f"adapter key {keys[0]!r} fits no parameter of the model",
                    near(keys[0], parameters),
                )
            notes.append(
                f"{len(keys)} updates of {component} are for another model and are not applied "
                f"({keys[0]!r} …)"
            )
        metadata = {**adapter.metadata, "notes": notes}
        return replace(adapter, entries=entries, metadata=metadata, names=None)


def taken_names(metadata: Json) -> ForeignNames | None:
    """Take the names that `ForeignNames.to_json` put there out of metadata; None without any."""
    format = metadata.pop("naming", None)
    components = metadata.pop("components", ())
    return ForeignNames(str(format), tuple(components)) if format else None


def _component_of(key: str) -> str:
    """The first component that a key may belong to; empty if it names none."""
    named, _ = split_component(key)
    if named:
        return named
    return next((component for component, _, _ in _readings(key) if component), "")


def one_model(adapter: Adapter, what: str) -> Adapter:
    """Prepare an adapter for a format that holds one model's updates under its parameter names.

    Args:
        adapter: From any file.
        what: The format, for messages.

    Raises:
        LoraFxError: The names cannot be resolved without a model, or belong to several components.
    """
    if adapter.names is None:
        return adapter
    components = {split_component(key)[0] for key in adapter}
    is_one_component = len(components) == 1 and "" not in components
    if adapter.names.format != "diffusers" or not is_one_component:
        key = next(iter(adapter), "")
        several = ""
        if len(components) > 1:
            several = f"; it has updates of {', '.join(sorted(components))}"
        raise LoraFxError(
            f"{what} needs the parameter names of one model; {key!r} is a name from a "
            f"{adapter.names.format} file{several}",
            "give the folder of the adapter's model: --base",
        )
    entries = {split_component(key)[1]: entry for key, entry in adapter.entries.items()}
    return replace(adapter, entries=entries, names=None)


def _readings(key: str) -> Iterator[Flat]:
    """Everything that a name of a file may mean."""
    module, _, leaf = key.rpartition(".")
    for component, flat in _readings_of_module(module):
        yield component, flat, leaf


def _readings_of_module(module: str) -> Iterator[tuple[str, str]]:
    """(component, the module in it with "_" for ".") of a module's name, component first."""
    for name, component in COMPONENTS.items():
        for prefix in (*component.prefixes, *component.homes):
            if not module.startswith(prefix):
                continue
            flat = module.removeprefix(prefix).replace(".", "_")
            for inner in (flat, flat.removeprefix(f"{name}_")):  # lora_unet_unet_
                yield name, inner
                yield name, inner.removeprefix("text_model_")
    flat = module.replace(".", "_")
    for prefix in _PREFIXES_OF_ANY_MODEL:
        if flat.startswith(prefix):
            yield "", flat.removeprefix(prefix)
    yield "", flat


def _spellings(name: str) -> Iterator[Flat]:
    """Everything by which a parameter of a model may stand in a file."""
    module, _, leaf = name.rpartition(".")
    for component, flat in _spellings_of_module(module):
        yield component, flat, leaf


def _spellings_of_module(module: str) -> Iterator[tuple[str, str]]:
    """(component, the module in it with "_" for ".") by which a file may name a module."""
    yield "", module.replace(".", "_")
    for component, home in _homes_of(module):
        path = module.removeprefix(home)
        yield component, path.replace(".", "_")
        if component.startswith("text_encoder"):
            yield component, path.removeprefix("text_model.").replace(".", "_")
        elif component == "unet":
            for name in sgm_names(path):
                yield component, name.replace(".", "_")


def _homes_of(module: str) -> list[tuple[str, str]]:
    """(component, what stands before its modules) that a name begins with, else all components."""
    homes = []
    for name, component in COMPONENTS.items():
        homes += [(name, home) for home in component.homes if module.startswith(home)]
    return homes or [(name, "") for name in COMPONENTS]


FLAT = NameRule(_spellings, _readings)
"""The rule by which names of files meet those of a model; see `lora_fx.targets.names`."""
