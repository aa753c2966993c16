"""The number of a layer, by which a block finds its layer in a key-value cache.

A decoder gives the whole cache to each of its blocks. Calls of two blocks are alike where each
asks for the layer of its own number, and does nothing else with the cache and with the number. So
while a block is traced, its number is a `LayerNumber`, which notes any other use, and the cache has
`WatchedLayers`, which note any other layer that is asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from lora_fx.fx.capture.block_family import Block, Place, TracedCall
from lora_fx.fx.capture.cache_layer import CacheLayer
from lora_fx.fx.capture.call import is_cache

COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
_OF_EVERY_CLASS = {"__new__", "__getattribute__", "__doc__"}


def layer_of(block: Block, leaves: Sequence[object]) -> CacheLayer | None:
    """Return the layer that a block fills in the cache among its arguments.

    None without a cache, and where the block's numbers do not tell one layer.
    """
    caches = {id(leaf): leaf for leaf in leaves if is_cache(leaf)}
    if len(caches) != 1:
        return None
    (cache,) = caches.values()
    layers = vars(cache).get("layers")
    if isinstance(layers, WatchedLayers):
        layers = layers.layers
    if not isinstance(layers, list) or not all(map(_is_of_transformers, (cache, *layers))):
        return None

    places: dict[Any, set[Place]] = {}
    for path, name in block.family.numbers:
        number = block.modules[path].__dict__.get(name)
        places.setdefault(number, set()).add((path, name))
    if len(places) != 1:
        return None
    ((number, places_of_number),) = places.items()
    if number not in range(len(layers)):
        return None
    return CacheLayer(cache, layers, number, frozenset(places_of_number))


def _is_of_transformers(thing: object) -> bool:
    """Whether an object has a class of transformers; a user's class may behave in any way."""
    return type(thing).__module__.startswith("transformers.")


class LayerNumber:
    """A stand-in for the layer number that a block holds, while calls of that block are traced.

    As an index of WatchedLayers it tells the layer. Any other use is a read by these calls of what
    their block holds, but for comparisons that come out alike for the number of any layer.

    Args:
        module: The module that holds it.
        name: The attribute that it is.
        calls: The traced calls.
    """

    def __init__(self, module: nn.Module, name: str, calls: Sequence[TracedCall]) -> None:
        self.calls = calls
        self.index: int = module.__dict__[name]
        self._held_as = module, name

    def number(self) -> int:
        """Return the number, for a use that may depend on its value."""
        for call in self.calls:
            call.reads(*self._held_as)
        return self.index

    def compared(self, compare: Callable[[object, object], object], other: object) -> object:
        """Compare the number with another object."""
        if type(other) is int:
            counts = [len(call.layer.layers) for call in self.calls if call.layer is not None]
            answers = {compare(i, other) for i in range(max(counts))}
            if len(answers) == 1:
                return answers.pop()
        return compare(self.number(), other)

    def __getattr__(self, name: str) -> object:
        """Return a method or property of the number."""
        return getattr(self.number(), name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class that isinstance finds."""
        return type(self.number())


def _forwarded(name: str) -> Callable[..., object]:
    """Return a special method that forwards to the number; Python looks for these in the class."""
    operation = vars(operator).get(name)
    reflected = vars(operator).get(name.replace("__r", "__", 1))

    def method(self: LayerNumber, *others: object) -> object:
        number = self.number()
        if operation is not None:
            return operation(number, *others)
        if reflected is not None:  # a number's own would not know a float
            return reflected(*others, number)
        return getattr(number, name)(*others)

    return method


def _compared(name: str) -> Callable[..., object]:
    compare = vars(operator)[name]
    return lambda self, other: self.compared(compare, other)


for _name, _method in vars(int).items():
    if _name in COMPARISONS:
        setattr(LayerNumber, _name, _compared(_name))
    elif _name.startswith("__") and callable(_method) and _name not in _OF_EVERY_CLASS:
        setattr(LayerNumber, _name, _forwarded(_name))


class WatchedLayers:
    """The layers of a cache while a block is traced; list methods that it lacks end the trace.

    Args:
        layers: The layers.
        calls: The calls that are traced now.
    """

    def __init__(self, layers: Sequence[Any], calls: Sequence[TracedCall]) -> None:
        self.layers = layers
        self._calls = calls

    def __len__(self) -> int:
        """Return the number of layers, which is the same for every block."""
        return len(self.layers)

    def __iter__(self) -> Iterator[Any]:
        """Yield all layers."""
        self.asked_for_by(())
        return iter(self.layers)

    def __getitem__(self, index: Any) -> Any:
        """Return the layer of a number; a plain number may belong to another block's layer."""
        if type(index) is not LayerNumber:
            self.asked_for_by(())
            return self.layers[index]
        self.asked_for_by(index.calls)
        return self.layers[index.index]

    def asked_for_by(self, calls: Sequence[TracedCall]) -> None:
        """Record that all open calls except these use another layer than their own."""
        for call in self._calls:
            if call not in calls:
                call.strays = True
