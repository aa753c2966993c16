"""The way from an adapter's names to a checkpoint's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.loaded_names import Loaded, Stack, loaded_of
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.targets.keys import base_name
from lora_fx.targets.names import NameRule, Names, also_called
from lora_fx.targets.prefix import Prefix, common_prefix
from lora_fx.text import JsonView


@dataclass(frozen=True, eq=False)
class Renaming:
    """The checkpoint's names of the tensors that an adapter names.

    A prefix that the adapter's names have more, or less, than the checkpoint's; then the names of
    the loaded model: rules of `lora_fx.targets.names`. Called with a name of the adapter it gives
    that of the checkpoint.

    Attributes:
        tensors: Those of the checkpoint.
        config: Its config.json.
        loaded: The names of the loaded model.
        prefix: What the adapter's names have before the checkpoint's, or lack.
    """

    tensors: Tensors
    config: JsonView
    loaded: Loaded
    prefix: Prefix

    @cached_property
    def _model_names(self) -> dict[str, str]:
        """Name in the file → in the loaded model, where it is another."""
        return {stored: name for name, stored in self.loaded.names.items()}

    @cached_property
    def _names(self) -> Names:
        def read(name: str) -> tuple[str]:
            return (self.prefixed(name),)

        in_model = {stored: (name,) for stored, name in self._model_names.items()}
        return Names(self.tensors, NameRule(readings=read), also_called(in_model, read))

    def __call__(self, name: str) -> str:
        """The checkpoint's name of a tensor; if it has no such tensor, the name with its prefix."""
        hits = self._names.find(name)
        if not hits:
            return self.prefixed(name)
        return hits[0]

    def prefixed(self, name: str) -> str:
        """A name of the adapter with the checkpoint's prefix, if there is one."""
        return self.prefix.changed(name)

    def stack(self, name: str) -> Stack | None:
        """The matrices that the checkpoint has instead of one tensor of this name."""
        return self.loaded.stacks.get(self.prefixed(name))

    def info(self, name: str) -> TensorInfo | None:
        """The tensor of an adapter's name; of a stack, its shape and its first matrix."""
        stack = self.stack(name)
        if stack is not None:
            return stack.info
        return self.tensors.get(self(name))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of that tensor."""
        info = self.info(name)
        return None if info is None else info.shape

    def back(self, name: str, *, loaded: bool = False) -> str:
        """The adapter's name of a tensor of the checkpoint, or of the model that loads it."""
        if loaded:
            name = self._model_names.get(name, name)
        return self.prefix.back(name)

    def tellers(self, names: Iterable[str]) -> tuple[bool, bool]:
        """Whether an adapter has names that only the file has, and names only the model has."""
        prefixed = [self.prefixed(name) for name in names]
        names_file = any(name in self._model_names for name in prefixed)
        names_model = any(name in self.loaded for name in prefixed)
        return names_file, names_model


def renaming(adapter: Adapter, tensors: Tensors, config: JsonView, notes: list[str]) -> Renaming:
    """Find the loaded model's names, and the prefix under which most names are known."""
    loaded = loaded_of(tensors, config)
    names = [base_name(key) for key in adapter.entries]
    prefix = common_prefix(names, {*tensors, *loaded.names, *loaded.stacks})
    rename = Renaming(tensors, config, loaded, prefix)
    if prefix.more:
        notes.append(f"the adapter's names are the base's names with {prefix.more!r} before them")
    elif prefix:
        notes.append(f"the adapter's names are the base's names without {prefix.less!r}")
    _, names_model = rename.tellers(names)
    if names_model:
        notes.append(
            "the adapter has the names of the loaded model: transformers 5 renames the "
            f"parameters of a {config.get('model_type')} when it loads it"
        )
    return rename
