"""The class of a Hugging Face folder whose config.json names none: the one that its weights fit.

Many classes of transformers share a `model_type`: the plain model, and one for each head. Each is
built without memory, and the names and shapes of its parameters are held against those of the
weights. The first of these that has an answer decides:

1. no weights are known: the plain model;
2. the plain model, where no weight is left over, the names are written as it writes them, and it
   misses none (or no class has them all);
3. the one class with a head that has every weight and misses none;
4. the plain model, where no weight is left over;
5. the one class with a head that has every weight and misses the fewest.

Where two classes answer alike, or weights are left over in all of them, the folder is refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from lora_fx.checkpoint.loaded_names import loaded_of
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.safetensors import Tensors
from lora_fx.files.sealed import unsealed
from lora_fx.text import JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
Block = Callable[[], contextlib.AbstractContextManager[None]]
PLAIN = "MODEL_MAPPING_NAMES"
SEQUENCE = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
BUFFERS = r"(^|\.)(masked_bias|inv_freq|position_ids)$"
"""What older versions of transformers wrote beside the weights."""
CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
MASKED = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"


@dataclass(frozen=True)
class Fit:
    """How the weights of a folder fit a class.

    Attributes:
        cls: The class.
        unused: Weights that it has no parameter for.
        passed: Those of them that transformers lets pass, such as buffers of older versions.
        missing: Parameters that have no weight; one of several tied names is enough.
        misshapen: Weights of another shape than the parameter's.
        prefixed: The weights are named as a class with a head names those of its body.
    """

    cls: type[PreTrainedModel]
    unused: tuple[str, ...]
    passed: frozenset[str]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    prefixed: bool

    @property
    def whole(self) -> bool:
        """True where weights and parameters are the same."""
        return not (self.unused or self.missing or self.misshapen)


def class_of_weights(
    transformers: ModuleType,
    config: PreTrainedConfig,
    raw: JsonView,
    stored: Tensors | None,
    counted: Block,
) -> tuple[type[PreTrainedModel] | None, str]:
    """The class, and what has to be said of it; None where transformers has no class of the type.

    Args:
        transformers: The package.
        config: Says how large the model is.
        raw: The same as config.json has it.
        stored: The tensors of the weights; None where there are none.
        counted: Makes a block in which a single model may be built.

    Raises:
        LoraFxError: Several classes fit alike, or weights are left over in every one.
    """
    file = f"{config.name_or_path}/config.json"
    kinds = _classes(transformers, config)
    plain = kinds.get(PLAIN, ())
    if not stored:
        chosen = plain[0] if plain else None
        return chosen, "" if chosen is None else _note(file, chosen, "as no weights tell more")

    shapes = _shapes(stored, raw)
    fits = []
    for cls in dict.fromkeys(cls for classes in kinds.values() for cls in classes):
        with contextlib.suppress(Exception):  # some classes take only some configs of a type
            with counted(), torch.device("meta"):
                module = cls._from_config(config)
            fits.append(_fit(module, shapes))
    if not fits:
        return (plain[0] if plain else None), ""

    fits = _without_strangers(fits)
    body = next((fit for fit in fits if fit.cls in plain and not fit.unused), None)
    heads = _told_apart([fit for fit in fits if fit.cls not in plain], kinds, config)
    whole = [fit for fit in heads if fit.whole]
    if body is not None and not body.prefixed and (body.whole or not whole):
        also = [fit.cls.__name__ for fit in whole]
        more = f"; {' and '.join(also)} would fit too" if also else ""
        return body.cls, _note(file, body.cls, f"whose weights they are{more}")
    if body is not None and not whole:
        return body.cls, _note(file, body.cls, "as no weights are those of a head")
    return _with_head(file, whole or heads, [fit for fit in fits if fit.cls in plain])


def _with_head(
    file: str, heads: Sequence[Fit], bodies: Sequence[Fit]
) -> tuple[type[PreTrainedModel], str]:
    """The one class with a head that has every weight, and misses the fewest."""
    usable = [fit for fit in heads if not fit.unused]
    shaped = [fit for fit in usable if not fit.misshapen] or usable
    if not shaped:
        least = min(
            (*bodies, *heads),
            key=lambda fit: (len(fit.unused), len(fit.misshapen), len(fit.missing)),
        )
        raise LoraFxError(
            f"{file} names no architectures, and no class of transformers for its model_type has "
            f"all of its weights: {least.cls.__name__} leaves out {some(least.unused, 4)}",
            f'"architectures": ["{least.cls.__name__}"] in config.json builds it without them',
        )
    fewest = min(len(fit.missing) for fit in shaped)
    best = [fit.cls.__name__ for fit in shaped if len(fit.missing) == fewest]
    if len(best) > 1:
        raise LoraFxError(
            f"{file} names no architectures, and its weights fit {some(best, 4)} alike",
            f'add "architectures": ["{best[0]}"] to config.json, or another of these',
        )
    (chosen,) = (fit.cls for fit in shaped if fit.cls.__name__ == best[0])
    return chosen, _note(file, chosen, "whose weights they are")


def _note(file: str, cls: type[PreTrainedModel], why: str) -> str:
    return f"{file} names no architectures: {cls.__name__} is built, {why}"


def class_names(transformers: ModuleType, model_type: str) -> dict[str, tuple[str, ...]]:
    """Table of transformers → names of its classes for a model type; the plain model's is first."""
    tables = vars(transformers.models.auto.modeling_auto)
    others = [n for n in tables if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES")]
    result = {}
    for table in dict.fromkeys((PLAIN, SEQUENCE, *others)):  # where heads fit alike, likely first
        named = tables[table].get(model_type)
        if named:
            result[table] = (named,) if isinstance(named, str) else tuple(named)
    return result


def _classes(
    transformers: ModuleType, config: PreTrainedConfig
) -> dict[str, tuple[type[PreTrainedModel], ...]]:
    """The same, as classes."""
    result = {}
    for table, names in class_names(transformers, config.model_type).items():
        classes = (getattr(transformers, name, None) for name in names)
        result[table] = tuple(
            cls
            for cls in classes
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        )
    return {table: classes for table, classes in result.items() if classes}


def _told_apart(
    heads: Sequence[Fit],
    kinds: Mapping[str, Sequence[type[PreTrainedModel]]],
    config: PreTrainedConfig,
) -> list[Fit]:
    """The classes without those that the config rules out, of heads that have the same names.

    A family with a head for masked tokens predicts next ones only as a decoder, and only the
    training of a sequence classifier writes a `problem_type`.
    """
    causal, masked = kinds.get(CAUSAL, ()), kinds.get(MASKED, ())
    ruled_out: list[type[PreTrainedModel]] = []
    if causal and masked:
        ruled_out += masked if getattr(config, "is_decoder", False) else causal
    left = [fit for fit in heads if fit.cls not in ruled_out]
    sequence = [fit for fit in left if fit.cls in kinds.get(SEQUENCE, ()) and fit.whole]
    return sequence if sequence and getattr(config, "problem_type", None) else left


def _shapes(stored: Tensors, raw: JsonView) -> Shapes:
    """Name in the loaded model → shape; empty where codes stand for it in another one."""
    with unsealed():
        quantised = quantised_weights(stored, raw)
    parts = tuple(name.removesuffix("weight") for name in quantised)
    shapes: dict[str, tuple[int, ...]] = {name: () for name in quantised}
    for name, tensor in stored.items():
        if name not in quantised and (name.endswith(".bias") or not name.startswith(parts or "\0")):
            shapes[name] = tuple(tensor.shape)
    loaded = loaded_of(stored, raw)
    for stack_name, stack in loaded.stacks.items():
        for part in stack.parts:
            shapes.pop(part.tensor, None)
        shapes[stack_name] = tuple(stack.info.shape)
    for new, old in loaded.names.items():
        if old in shapes:
            shapes[new] = shapes.pop(old)
    return shapes


def _fit(module: PreTrainedModel, shapes: Shapes) -> Fit:
    """Hold weights against a model on the meta device, as transformers' loader names them."""
    cls = type(module)
    prefix = f"{cls.base_model_prefix}."
    parameters = dict(module.named_parameters(remove_duplicate=False))
    places = {**parameters, **dict(module.named_buffers())}
    unused, misshapen, reached = [], [], set()
    prefixed = False
    for name, shape in shapes.items():
        ways = (name, prefix + name, name.removeprefix(prefix))
        place = next((way for way in ways if way in places), None)
        if place is None:
            unused.append(name)
            continue
        prefixed = prefixed or place != name == prefix + place
        tensor = places[place]
        reached.add(id(tensor))
        if shape and shape != tuple(tensor.shape):
            misshapen.append(name)
    missing = [name for name, tensor in parameters.items() if id(tensor) not in reached]
    unexpected = getattr(module, "_keys_to_ignore_on_load_unexpected", None)
    return Fit(
        cls,
        tuple(unused),
        frozenset(unused).difference(_without(unused, (BUFFERS, *(unexpected or ())))),
        _without(missing, getattr(module, "_keys_to_ignore_on_load_missing", None)),
        tuple(misshapen),
        prefixed,
    )


def _without_strangers(fits: Sequence[Fit]) -> list[Fit]:
    """The fits without what transformers lets pass.

    A weight that another class of the family uses does not pass: T5's encoder leaves out a decoder.
    """
    strangers = set.intersection(*(set(fit.unused) for fit in fits))
    result = []
    for fit in fits:
        passed = fit.passed & strangers
        unused = tuple(name for name in fit.unused if name not in passed)
        result.append(replace(fit, unused=unused))
    return result


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> tuple[str, ...]:
    """The names that no pattern of transformers lets pass."""
    ignored = [re.compile(pattern) for pattern in patterns or ()]
    return tuple(name for name in names if not any(p.search(name) for p in ignored))
