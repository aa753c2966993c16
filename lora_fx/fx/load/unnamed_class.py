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
"""The names of buffers that older versions of transformers wrote with the weights."""
CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
MASKED = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"


@dataclass(frozen=True)
class Fit:
    """The fit of a folder's weights to a class.

    Attributes:
        cls: The class.
        unused: Weights that it has no parameter for.
        ignored: Those of them that transformers lets pass, such as buffers of older versions.
        missing: Parameters that have no weight; one of several tied names is enough.
        misshapen: Weights of another shape than the parameter's.
        prefixed: The weights are named as a class with a head names those of its body.
    """

    cls: type[PreTrainedModel]
    unused: tuple[str, ...]
    ignored: frozenset[str]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    prefixed: bool

    @property
    def is_exact(self) -> bool:
        """True where weights and parameters are the same."""
        return not (self.unused or self.missing or self.misshapen)


def class_of_weights(
    transformers: ModuleType,
    config: PreTrainedConfig,
    raw: JsonView,
    stored: Tensors | None,
    counted: Block,
) -> tuple[type[PreTrainedModel] | None, str]:
    """The class and a note that says so; None where transformers has no class of the type.

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
    classes_by_table = _classes(transformers, config)
    plain = classes_by_table.get(PLAIN, ())
    if not stored:  # rule 1
        if not plain:
            return None, ""
        return plain[0], _note(file, plain[0], "since the file has no weights to choose by")

    fits = _fits(classes_by_table, config, _shapes(stored, raw), counted)
    if not fits:
        if not plain:
            return None, ""
        return plain[0], ""

    # rules 2 to 5
    fits = _without_strangers(fits)
    bodies = [fit for fit in fits if fit.cls in plain]
    body = next((fit for fit in bodies if not fit.unused), None)
    all_heads = [fit for fit in fits if fit.cls not in plain]
    heads = _not_ruled_out(all_heads, classes_by_table, config)
    exact_heads = [fit for fit in heads if fit.is_exact]
    if body is not None and not body.prefixed and (body.is_exact or not exact_heads):
        # rule 2
        why = "which has exactly these weights"
        if exact_heads:
            names = " and ".join(fit.cls.__name__ for fit in exact_heads)
            why += f"; {names} would fit too"
        return body.cls, _note(file, body.cls, why)
    if body is not None and not exact_heads:  # rule 4: there is no class for rule 3
        return body.cls, _note(file, body.cls, "since none of the weights belongs to a head")
    return _with_head(file, exact_heads or heads, bodies)  # rules 3 and 5


def _fits(
    classes_by_table: Mapping[str, Sequence[type[PreTrainedModel]]],
    config: PreTrainedConfig,
    shapes: Shapes,
    counted: Block,
) -> list[Fit]:
    """The fit of the weights to each class that can be built from the config."""
    classes: dict[type[PreTrainedModel], None] = {}
    for table_classes in classes_by_table.values():
        classes.update(dict.fromkeys(table_classes))
    fits = []
    for cls in classes:
        with contextlib.suppress(Exception):  # some classes take only some configs of a type
            with counted(), torch.device("meta"):
                module = cls._from_config(config)
            fits.append(_fit(module, shapes))
    return fits


def _with_head(
    file: str, heads: Sequence[Fit], bodies: Sequence[Fit]
) -> tuple[type[PreTrainedModel], str]:
    """The one class with a head that has every weight, and misses the fewest."""
    usable = [fit for fit in heads if not fit.unused]
    candidates = [fit for fit in usable if not fit.misshapen] or usable
    if not candidates:
        nearest = min((*bodies, *heads), key=_distance)
        name = nearest.cls.__name__
        raise LoraFxError(
            f"{file} names no architectures, and no class of transformers for its model_type has "
            f"all of its weights: {name} lacks {some(nearest.unused, 4)}",
            f'add "architectures": ["{name}"] to config.json to build it without them',
        )
    fewest = min(len(fit.missing) for fit in candidates)
    best = [fit for fit in candidates if len(fit.missing) == fewest]
    if len(best) > 1:
        names = [fit.cls.__name__ for fit in best]
        raise LoraFxError(
            f"{file} names no architectures, and its weights fit several classes: {some(names, 4)}",
            f'add "architectures": ["{names[0]}"] to config.json, or another of these classes',
        )
    cls = best[0].cls
    return cls, _note(file, cls, "which has these weights")


def _distance(fit: Fit) -> tuple[int, int, int]:
    """The distance of weights from a class: unused weights count most, missing ones least."""
    return len(fit.unused), len(fit.misshapen), len(fit.missing)


def _note(file: str, cls: type[PreTrainedModel], why: str) -> str:
    return f"{file} names no architectures: {cls.__name__} is built, {why}"


def class_names(transformers: ModuleType, model_type: str) -> dict[str, tuple[str, ...]]:
    """Table of transformers → names of its classes for a model type; the plain model's is first."""
    tables = vars(transformers.models.auto.modeling_auto)
    likely_first = [PLAIN, SEQUENCE]  # where heads fit alike
    for table in tables:
        if table.startswith("MODEL_") and table.endswith("_MAPPING_NAMES"):
            likely_first.append(table)
    result: dict[str, tuple[str, ...]] = {}
    for table in dict.fromkeys(likely_first):
        names = tables[table].get(model_type)
        if isinstance(names, str) and names:
            result[table] = (names,)
        elif names:
            result[table] = tuple(names)
    return result


def _classes(
    transformers: ModuleType, config: PreTrainedConfig
) -> dict[str, tuple[type[PreTrainedModel], ...]]:
    """Table of transformers → its classes for a config's model type, as `class_names`."""
    result = {}
    for table, names in class_names(transformers, config.model_type).items():
        classes = []
        for name in names:
            cls = getattr(transformers, name, None)
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
                classes.append(cls)
        if classes:
            result[table] = tuple(classes)
    return result


def _not_ruled_out(
    heads: Sequence[Fit],
    classes_by_table: Mapping[str, Sequence[type[PreTrainedModel]]],
    config: PreTrainedConfig,
) -> list[Fit]:
    """The classes without those that the config rules out, of heads that have the same names.

    A family with a head for masked tokens predicts next ones only as a decoder, and only the
    training of a sequence classifier writes a `problem_type`.
    """
    causal = classes_by_table.get(CAUSAL, ())
    masked = classes_by_table.get(MASKED, ())
    ruled_out: Sequence[type[PreTrainedModel]] = ()
    if causal and masked:
        ruled_out = masked if getattr(config, "is_decoder", False) else causal
    possible = [fit for fit in heads if fit.cls not in ruled_out]
    if not getattr(config, "problem_type", None):
        return possible
    classifiers = classes_by_table.get(SEQUENCE, ())
    exact_classifiers = [fit for fit in possible if fit.cls in classifiers and fit.is_exact]
    return exact_classifiers or possible


def _shapes(stored: Tensors, raw: JsonView) -> Shapes:
    """Name in the loaded model → shape; empty if the tensor is stored as codes of another shape."""
    with unsealed():
        quantised = quantised_weights(stored, raw)
    quantised_layers = tuple(name.removesuffix("weight") for name in quantised)
    shapes: dict[str, tuple[int, ...]] = {name: () for name in quantised}
    for name, tensor in stored.items():
        if name in quantised:
            continue
        if name.endswith(".bias") or not name.startswith(quantised_layers):
            shapes[name] = tuple(tensor.shape)
    loaded = loaded_of(stored, raw)
    for stack_name, stack in loaded.stacks.items():
        for part in stack.parts:
            shapes.pop(part.tensor, None)
        shapes[stack_name] = tuple(stack.info.shape)
    for model_name, file_name in loaded.names.items():
        if file_name in shapes:
            shapes[model_name] = shapes.pop(file_name)
    return shapes


def _fit(module: PreTrainedModel, shapes: Shapes) -> Fit:
    """Hold weights against a model on the meta device, as transformers' loader names them."""
    cls = type(module)
    prefix = f"{cls.base_model_prefix}."
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(module.named_buffers())}
    unused = []
    misshapen = []
    filled = set()  # identities of the tensors that weights have
    prefixed = False
    for name, shape in shapes.items():
        names = (name, prefix + name, name.removeprefix(prefix))
        model_name = next((candidate for candidate in names if candidate in tensors), None)
        if model_name is None:
            unused.append(name)
            continue
        if model_name != name and name == prefix + model_name:
            prefixed = True
        tensor = tensors[model_name]
        filled.add(id(tensor))
        if shape and shape != tuple(tensor.shape):
            misshapen.append(name)

    missing = [name for name, tensor in parameters.items() if id(tensor) not in filled]
    may_miss = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    may_leave = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    not_ignored = _without(unused, (BUFFERS, *may_leave))
    return Fit(
        cls,
        unused=tuple(unused),
        ignored=frozenset(unused).difference(not_ignored),
        missing=_without(missing, may_miss),
        misshapen=tuple(misshapen),
        prefixed=prefixed,
    )


def _without_strangers(fits: Sequence[Fit]) -> list[Fit]:
    """The fits without weights that transformers ignores.

    A weight that another class of the family uses does not pass: T5's encoder leaves out a decoder.
    """
    strangers = set.intersection(*(set(fit.unused) for fit in fits))
    result = []
    for fit in fits:
        ignored = fit.ignored & strangers
        unused = tuple(name for name in fit.unused if name not in ignored)
        result.append(replace(fit, unused=unused))
    return result


def _without(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """The names that no pattern of transformers lets pass."""
    forms = [re.compile(pattern) for pattern in patterns]
    return tuple(name for name in names if not any(form.search(name) for form in forms))
