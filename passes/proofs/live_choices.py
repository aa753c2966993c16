"""Run live models op by op, and record their choices or repeat the choices of another run.

No graph is needed: every op of a user's own module is seen when torch dispatches it. What it
chooses, integers and booleans that an op makes of floats, may come from another run of the same
model, or of its graph, where rounding alone has turned it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from lora_fx.compare import Choice, grow, nearest_choice
from lora_fx.dtypes import Array
from lora_fx.fx.python_dispatch import TorchDispatchMode
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.trees import tree_leaves, tree_map
from lora_fx.inputs import Named
from lora_fx.passes.proofs.reference import Choices, Run, Shown


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which a model repeats the choices of another run, for ops that both have.

    Args:
        others: The choices of the other run by name.

    Attributes:
        choices: Those that were made, by name.
        floats: What the other run's choices are among, by the names that it has for them.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: a compiled region runs as compiled, as one op.

        Of a function that torch.compile or torch.cond meets in another dispatch mode, torch notes
        for good that it is not to be compiled: torch.cond would fail in the process from then on.
        """
        return True

    def __init__(self, others: Mapping[str, Choice]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others = others
        self.choices: dict[str, Choice] = {}
        self.floats: dict[str, Array] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of an op, in which choices are replaced."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)  # one of graphs has none
        floats = [leaf for leaf in tree_leaves((args, kwargs)) if _is_plain_float(leaf)]
        if schema is None or schema.is_mutable or not floats:
            return result
        if not any(_is_discrete(leaf) for leaf in tree_leaves(result)):
            return result

        among = [to_numpy(tensor) for tensor in floats]

        def chosen(leaf: Any) -> Any:
            return self._chosen(func, leaf, among) if _is_discrete(leaf) else leaf

        return tree_map(chosen, result)

    def _chosen(self, func: Any, result: torch.Tensor, among: list[Array]) -> torch.Tensor:
        """A result of an op, or the choice that the other run made in its place."""
        name = f"{func}:{len(self.choices)}"
        floats = {f"{name}.{i}": value for i, value in enumerate(among)}
        choice = Choice(to_numpy(result), floats)
        nearest = nearest_choice(choice, self.others)
        if not nearest:
            self.choices[name] = choice
            return result

        reference = self.others[nearest]
        for name_in_reference, name_here in choice.pairs(reference).items():
            self.floats[name_in_reference] = floats[name_here]
        self.choices[name] = Choice(reference.value, floats)
        return from_numpy(reference.value).to(result.device, result.dtype)


def _is_plain(x: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor whose numbers can be read."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        return False
    return type(x) in (torch.Tensor, torch.nn.Parameter)  # a subclass says what its numbers are


def _is_plain_float(x: object) -> bool:
    return _is_plain(x) and x.is_floating_point()


def _is_discrete(x: object) -> bool:
    return _is_plain(x) and not x.is_floating_point() and not x.is_complex()


@dataclass(frozen=True)
class LiveRerun:
    """The Rerun of a user's own module.

    Attributes:
        run: Runs it on arrays by input name.
    """

    run: Run

    def stepped(self) -> Iterator[Run]:
        """None: torch's sigmoid is exact relative to its result."""
        return iter(())

    def plain(self) -> Run | None:
        """None: torch rewrites nothing."""
        return None

    def choosing(self, choices: Choices) -> Run | None:
        """Implement `Rerun.choosing`."""
        reference_choices = choices.named()

        def run(feeds: Named) -> dict[str, Array]:
            with Dispatched(reference_choices) as block:
                outputs = self.run(feeds)
            return {**outputs, **block.floats}

        return run


def live_choices(
    run: Callable[[], dict[str, Array]], moved: Iterable[Callable[[], dict[str, Array]]]
) -> Choices:
    """The choices of a live model.

    Args:
        run: Runs it, and gives its outputs.
        moved: The same with weights moved by half a unit of their last place.
    """
    with Dispatched({}) as block:
        outputs = run()
    choices = block.choices
    floats: dict[str, Array] = {}
    for choice in choices.values():
        floats |= choice.among

    def own(shown: Shown) -> Iterator[Mapping[str, float]]:
        largest_errors: dict[str, float] = {}
        exact = shown({**outputs, **floats})
        for run_moved in moved:
            with Dispatched(choices) as following:
                moved_outputs = run_moved()
            yield grow(largest_errors, shown({**moved_outputs, **following.floats}), exact)

    values = {name: choice.value for name, choice in choices.items()}
    among = {name: tuple(choice.among) for name, choice in choices.items()}
    return Choices(values, among, {**outputs, **floats}, own)
