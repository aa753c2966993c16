"""Models whose layers differ by something that is no part of them, drawn from a table.

A row of PLACES says where a layer finds its number: in an object that all share, its class, a
closure, a global. A row of EFFECTS says what the number does: to values, to distances beyond the
example's length, in train mode. With `moving=False` the place is there, and the number the same in
every layer: such layers are alike, and are traced once.

    python -m tests.trust.hidden 0 60
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.unchanged import alike

WIDTH, LENGTH, DEPTH = 6, 4, 3
LENGTHS = (LENGTH, 4 * LENGTH, 11 * LENGTH)
"""Of the example, and those at which a graph is compared with its model here."""


# What the number of a layer does.


def value(x: Any, k: int, training: bool) -> Any:
    return x * (1.0 + 0.25 * k)


def _distances(x: Any) -> Any:
    places = torch.arange(x.shape[1], device=x.device)
    return (places[:, None] - places[None]).abs()


def _mixed(x: Any, limit: int) -> Any:
    """Rows mixed by their distances, which are clipped."""
    return torch.softmax(-0.3 * _distances(x).clamp(max=limit).to(x.dtype), -1) @ x


def length(x: Any, k: int, training: bool) -> Any:
    return _mixed(x, LENGTH + 1 + k)


def far(x: Any, k: int, training: bool) -> Any:
    """Beyond four times the example's length, and the first layer's clip is the largest."""
    return _mixed(x, 5 * LENGTH + 3 - k)


def least(x: Any, k: int, training: bool) -> Any:
    """As far, by the minimum of two tensors, as T5 has it."""
    limit = torch.full((), 5 * LENGTH + 3 - k)
    return torch.softmax(-0.3 * torch.minimum(_distances(x), limit).to(x.dtype), -1) @ x


def mode(x: Any, k: int, training: bool) -> Any:
    return x * (1.0 + 0.25 * k) if training else x


def large(x: Any, k: int, training: bool) -> Any:
    """A clip of values that the example does not reach."""
    return x.clamp(-6.0 - k, 6.0 + k)


def small(x: Any, k: int, training: bool) -> Any:
    """A difference of 1e-6 and less, in numbers that are no larger."""
    return x * 0.01 * (1.0 + 0.25 * k)


EFFECTS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (value, length, far, least, mode, large, small)
}  # fmt: skip


# Where a layer finds its number.


class Layer(nn.Module):
    """Two products, and an effect of the number that its class asks for."""

    effect: Callable[..., Any]
    start = 0

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 10)
        self.act = nn.Tanh()
        self.down = nn.Linear(10, WIDTH)

    def number(self) -> int:
        return 0

    def forward(self, x: Any) -> Any:
        y = x + self.down(self.act(self.up(x)))
        return type(self).effect(y, self.number(), self.training)


class Net(nn.Module):
    """Layers one after the other; `begin` is called first, and `before` before each.

    A capture traces a copy, so what they change they find by the net.
    """

    def __init__(self, layers: list[Layer], begin: Any = None, before: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.begin, self.before = begin, before

    def forward(self, x: Any) -> Any:
        if self.begin is not None:
            self.begin(self)
        for i, layer in enumerate(self.layers):
            if self.before is not None:
                self.before(self, i)
            x = layer(x)
        return x


STATE: dict[str, Any] = {"k": 0, "table": {}, "by_module": weakref.WeakKeyDictionary()}
COUNT = 0
CURRENT: ContextVar[int] = ContextVar("CURRENT", default=0)
LOCAL = threading.local()
LOCAL.k = 0
MODEL: list[Any] = []


class Tally:
    """An object that counts; `slots` and a method hide it further."""

    __slots__ = ("k", "step")

    def __init__(self, step: int) -> None:
        self.k, self.step = 0, step

    def next(self) -> int:
        self.k += self.step
        return self.k

    def reset(self) -> None:
        self.k = 0


class Namespace(types.SimpleNamespace):
    pass


class OfClass:
    """An object whose class counts."""

    k = 0
    step = 1

    def next(self) -> int:
        if self.step:
            type(self).k += self.step
        return type(self).k


class Still(nn.Module):
    """A module that all layers share without registering it."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.k, self.step = 0, step

    def forward(self, x: Any) -> Any:
        self.k += self.step
        return x


def _layers(kind: type[Layer], effect: Any) -> list[Layer]:
    made = type(kind.__name__, (kind,), {"effect": staticmethod(effect), "__module__": __name__})
    return [made() for _ in range(DEPTH)]


def _asking(ask: Callable[[Any], int]) -> type[Layer]:
    return type("Asking", (Layer,), {"number": lambda self: ask(self), "__module__": __name__})


def shared_object(effect: Any, step: int) -> Net:
    tally = Tally(step)
    layers = _layers(_asking(lambda self: self.tally.next() if self.tally.step else 1), effect)
    for layer in layers:
        layer.tally = tally
    return Net(layers, lambda net: net.layers[0].tally.reset())


def shared_field(effect: Any, step: int) -> Net:
    now = Namespace(k=0)
    layers = _layers(_asking(lambda self: self.now.k), effect)
    for layer in layers:
        layer.now = now
    return Net(layers, before=lambda net, i: setattr(net.layers[0].now, "k", i * step))


def _shared(thing: Any, effect: Any, step: int) -> Net:
    """One thing that all layers have, whose first number the net sets by the first of them."""
    layers = _layers(_asking(lambda self: int(self.thing[0])), effect)
    for layer in layers:
        layer.thing = thing
    return Net(layers, before=lambda net, i: net.layers[0].thing.__setitem__(0, i * step))


def shared_list(effect: Any, step: int) -> Net:
    return _shared([0], effect, step)


def shared_queue(effect: Any, step: int) -> Net:
    return _shared(deque([0]), effect, step)


def array_of_numpy(effect: Any, step: int) -> Net:
    return _shared(np.zeros(1, int), effect, step)


def array_of_bytes(effect: Any, step: int) -> Net:
    return _shared(bytearray(1), effect, step)


def array_of_c(effect: Any, step: int) -> Net:
    return _shared((ctypes.c_int * 1)(), effect, step)


def event(effect: Any, step: int) -> Net:
    """A flag of threading."""
    flag = threading.Event()
    layers = _layers(_asking(lambda self: int(flag.is_set())), effect)
    return Net(layers, before=lambda net, i: flag.set() if i * step else flag.clear())


class OfKinds(type):
    k = 0

    @property
    def number(cls) -> int:
        return cls.k


def metaclass(effect: Any, step: int) -> Net:
    kind: Any = OfKinds("Kind", (), {"__module__": __name__})
    layers = _layers(_asking(lambda self: kind.number), effect)
    return Net(layers, before=lambda net, i: setattr(OfKinds, "k", i * step))


def shared_module(effect: Any, step: int) -> Net:
    still = Still(step)
    layers = _layers(_asking(lambda self: (self.still[0](0), self.still[0].k)[1]), effect)
    for layer in layers:
        layer.still = [still]
    return Net(layers, lambda net: setattr(net.layers[0].still[0], "k", 0))


class ByClass(Layer):
    k = 0
    step = 1

    def number(self) -> int:
        kind = type(self)
        if kind.step:
            kind.k += kind.step
        return kind.k


def class_counter(effect: Any, step: int) -> Net:
    layers: list[Any] = _layers(ByClass, effect)
    type(layers[0]).step = step
    return Net(layers, lambda net: setattr(type(layers[0]), "k", 0))


def class_of_object(effect: Any, step: int) -> Net:
    kind = type("Mine", (OfClass,), {"step": step, "__module__": __name__})
    counting = kind()
    layers = _layers(_asking(lambda self: self.counting.next()), effect)
    for layer in layers:
        layer.counting = counting
    return Net(layers, lambda net: setattr(kind, "k", 0))


class ByVars(Layer):
    def number(self) -> int:
        return int(vars(self)["index"])


class ByDict(Layer):
    def number(self) -> int:
        return int(self.__dict__.get("index", 0))


def _index_of(module: Any) -> int:
    return int(vars(module)["index"])


class ByHelper(Layer):
    def number(self) -> int:
        return _index_of(self)


def _indexed(kind: type[Layer], effect: Any, step: int) -> Net:
    layers = _layers(kind, effect)
    for i, layer in enumerate(layers):
        layer.index = i * step
    return Net(layers)


def closure(effect: Any, step: int) -> Net:
    k = 0

    def ask(_: Any) -> int:
        nonlocal k
        if step:
            k += step
        return k

    def begin(_: Net) -> None:
        nonlocal k
        k = 0

    return Net(_layers(_asking(ask), effect), begin)


def default_argument(effect: Any, step: int) -> Net:
    def ask(_: Any, seen: list[int] = []) -> int:  # noqa: B006
        if step:
            seen.append(1)
        return len(seen)

    return Net(_layers(_asking(ask), effect), lambda net: ask.__defaults__[0].clear())


def function_attribute(effect: Any, step: int) -> Net:
    def ask(_: Any) -> int:
        state: Any = ask
        if state.step:
            state.k += state.step
        return int(state.k)

    vars(ask).update(k=0, step=step)
    return Net(_layers(_asking(ask), effect), lambda net: setattr(ask, "k", 0))


def partial_of_list(effect: Any, step: int) -> Net:
    seen: list[int] = []

    def count(seen: list[int], _: Any) -> int:
        seen.extend([1] * step)
        return len(seen)

    return Net(_layers(_asking(functools.partial(count, seen)), effect), lambda net: seen.clear())


class ByGlobal(Layer):
    step = 1

    def number(self) -> int:
        global COUNT
        if self.step:
            COUNT += self.step
        return COUNT


def _zero(_: Net) -> None:
    global COUNT
    COUNT = 0


def module_global(effect: Any, step: int) -> Net:
    layers: list[Any] = _layers(ByGlobal, effect)
    type(layers[0]).step = step
    return Net(layers, _zero)


def module_dict(effect: Any, step: int) -> Net:
    return Net(
        _layers(_asking(lambda self: STATE["k"]), effect),
        before=lambda net, i: STATE.update(k=i * step),
    )


def other_module(effect: Any, step: int) -> Net:
    """The state of another file, imported in the function."""
    held: Any = types.ModuleType("hidden_state")
    held.k = 0
    sys.modules["hidden_state"] = held

    def ask(_: Any) -> int:
        import hidden_state  # type: ignore[import-not-found]

        return int(hidden_state.k)

    return Net(_layers(_asking(ask), effect), before=lambda net, i: setattr(held, "k", i * step))


def context_variable(effect: Any, step: int) -> Net:
    layers = _layers(_asking(lambda self: CURRENT.get()), effect)
    return Net(layers, before=lambda net, i: CURRENT.set(i * step) and None)


def thread_local(effect: Any, step: int) -> Net:
    layers = _layers(_asking(lambda self: LOCAL.k), effect)
    return Net(layers, before=lambda net, i: setattr(LOCAL, "k", i * step))


def hook_of_block(effect: Any, step: int) -> Net:
    layers = _layers(_asking(lambda self: STATE["k"]), effect)
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, x: STATE.update(k=STATE["k"] + step))
    return Net(layers, lambda net: STATE.update(k=0))


def hook_of_part(effect: Any, step: int) -> Net:
    """A hook inside the layers: such layers are traced one by one, whatever it does."""
    layers = _layers(_asking(lambda self: STATE["k"]), effect)
    for layer in layers:
        layer.up.register_forward_hook(lambda m, x, y: STATE.update(k=STATE["k"] + step))
    return Net(layers, lambda net: STATE.update(k=0))


class Parent(Net):
    """Puts its layers down in a list and a table, whichever copy of it is called."""

    step = 0

    def forward(self, x: Any) -> Any:
        MODEL[:] = [list(self.layers)]
        places = {layer: i * self.step for i, layer in enumerate(self.layers)}
        STATE["table"] = {id(layer): k for layer, k in places.items()}
        STATE["by_module"].update(places)
        return super().forward(x)


class ById(Layer):
    def number(self) -> int:
        return int(STATE["table"].get(id(self), 0))


def by_id(effect: Any, step: int) -> Net:
    return _parent(ById, effect, step)


def _parent(kind: type[Layer], effect: Any, step: int) -> Net:
    net = Parent(_layers(kind, effect))
    net.step = step
    return net


class ByModule(Layer):
    def number(self) -> int:
        return int(STATE["by_module"].get(self, 0))


def by_module(effect: Any, step: int) -> Net:
    return _parent(ByModule, effect, step)


def by_parent(effect: Any, step: int) -> Net:
    """A layer looks itself up among all of them."""

    def ask(layer: Any) -> int:
        return next((i for i, m in enumerate(MODEL[0]) if m is layer), 0) * step

    return Parent(_layers(_asking(ask), effect))


def iterator(effect: Any, step: int) -> Net:
    held = {"k": itertools.repeat(0)}

    def begin(_: Net) -> None:
        held["k"] = itertools.count(0, step)

    return Net(_layers(_asking(lambda self: next(held["k"])), effect), begin)


def generator(effect: Any, step: int) -> Net:
    held: dict[str, Any] = {}

    def begin(_: Net) -> None:
        held["k"] = (i * step for i in itertools.count())

    return Net(_layers(_asking(lambda self: next(held["k"])), effect), begin)


def popped(effect: Any, step: int) -> Net:
    left: list[int] = []

    def begin(_: Net) -> None:
        left[:] = [i * step for i in range(DEPTH)]

    return Net(_layers(_asking(lambda self: left.pop()), effect), begin)


def environment(effect: Any, step: int) -> Net:
    """No snapshot sees it: only a run tells."""
    layers = _layers(_asking(lambda self: int(os.environ.get("LORA_FX_TEST_K", 0))), effect)
    return Net(layers, before=lambda net, i: os.environ.update(LORA_FX_TEST_K=str(i * step)))


PLACES: dict[str, Callable[[Any, int], Net]] = {
    "shared_object": shared_object,
    "shared_field": shared_field,
    "shared_list": shared_list,
    "shared_queue": shared_queue,
    "array_of_numpy": array_of_numpy,
    "array_of_bytes": array_of_bytes,
    "array_of_c": array_of_c,
    "event": event,
    "metaclass": metaclass,
    "shared_module": shared_module,
    "class_counter": class_counter,
    "class_of_object": class_of_object,
    "vars": functools.partial(_indexed, ByVars),
    "dict": functools.partial(_indexed, ByDict),
    "helper": functools.partial(_indexed, ByHelper),
    "closure": closure,
    "default_argument": default_argument,
    "function_attribute": function_attribute,
    "partial": partial_of_list,
    "global": module_global,
    "module_dict": module_dict,
    "other_module": other_module,
    "context_variable": context_variable,
    "thread_local": thread_local,
    "hook_of_block": hook_of_block,
    "hook_of_part": hook_of_part,
    "by_id": by_id,
    "by_module": by_module,
    "by_parent": by_parent,
    "iterator": iterator,
    "generator": generator,
    "popped": popped,
    "environment": environment,
}
NEVER_ALIKE = {"hook_of_part", "by_id", "by_module", "by_parent", "iterator", "generator", "popped"}
"""Places that tell layers apart, or that nothing can be told of, whatever they give."""


@dataclass(frozen=True)
class Verdict:
    """What became of a model: copies by mode, and how far its graphs are off."""

    name: str
    copies: tuple[int, ...]
    worst: float
    notes: tuple[str, ...]

    @property
    def right(self) -> bool:
        return self.worst <= 2e-5


def drawn(seed: int) -> tuple[str, str]:
    """(place, effect) of a number; numbers below the size of the table have no pair in common."""
    turn, at = divmod(seed, len(PLACES))
    effects = np.random.default_rng(at).permutation(list(EFFECTS))
    return list(PLACES)[at], str(effects[turn % len(effects)])


def verdict(place: str, effect: str, *, moving: bool = True) -> Verdict:
    """Capture a model in both modes and compare its graphs with it, also far beyond the example."""
    torch.manual_seed(0)
    STATE["table"].clear()  # of the model before, which may live until garbage is collected
    STATE["by_module"].clear()
    MODEL.clear()
    model = PLACES[place](EFFECTS[effect], int(moving)).eval()
    model.requires_grad_(False)  # else the first layer alone has an argument without gradient
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    cap = Captured(model, (x,))
    worst, copies = 0.0, []
    for training in (False, True):
        traced = cap.traced(training, cap.named)
        copies.append(traced.copies)
        graph = fx.GraphModule(cap._tensors(traced), cap.fx_graph(training).graph)
        for n in LENGTHS:
            for scale in (1.0, 20.0):
                y = scale * torch.randn(3, n, WIDTH, generator=torch.Generator().manual_seed(n))
                with torch.no_grad(), alike(model, training=training):
                    want = model(y)
                with torch.no_grad():
                    (got,) = fx.Interpreter(graph).run(y, enable_io_processing=False)
                worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    notes = tuple(n for n in cap.notes if "alike" in n)
    return Verdict(f"{place}-{effect}{'' if moving else '-still'}", tuple(copies), worst, notes)


def main(first: int, count: int) -> int:
    """Print a line a model; the number of wrong ones."""
    wrong = 0
    for seed in range(first, first + count):
        found = verdict(*drawn(seed))
        wrong += not found.right
        how = "traced once" if any(found.copies) else "traced whole"
        ok = "ok" if found.right else "WRONG"
        print(f"{seed:4} {found.name:30} {how:13} {ok} {found.worst:.1e}")
    print(f"{count} models, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:3])) > 0)
