"""Names of foreign files that do not name a parameter of one model, and how a model resolves them.

Image models have components, each a model of its own: a UNet or transformer, and text encoders.

=================  =================================  =========================================
component          kohya, with "_" for "."            diffusers, and single-file checkpoints
=================  =================================  =========================================
unet               lora_unet_                         unet. · model.diffusion_model. · …
transformer        lora_transformer_, lora_unet_      transformer. · model.diffusion_model. · …
text_encoder       lora_te_, lora_te1_                text_encoder. · cond_stage_model. …
text_encoder_2     lora_te2_                          text_encoder_2.
(any model)        lycoris_, lora_                    as the model has it
=================  =================================  =========================================

"_" for "." cannot be undone by itself (`a_b.c` and `a.b_c` are one text), so names stay the
file's until `ForeignNames.resolve` compares them with those of a model, both with "_" for ".".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.updates import Entry
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import tensors
from lora_fx.targets.names import EXACT, NameRule, Names
from lora_fx.text import Json, near

Flat = tuple[str, str, str]
"""(component, module with "_" for ".", leaf) of a name."""


@dataclass(frozen=True)
class Component:
    """Prefixes of one component: kohya's, and the dotted ones of pipelines and checkpoints."""

    prefixes: tuple[str, ...]
    homes: tuple[str, ...]


_DIFFUSION = ("model.diffusion_model.", "diffusion_model.")
COMPONENTS = {
    "unet": Component(("lora_unet_",), ("unet.", "transformer.", *_DIFFUSION)),
    "transformer": Component(("lora_transformer_",), ("transformer.", *_DIFFUSION)),
    "text_encoder": Component(
        ("lora_te_", "lora_te1_"),
        ("text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    ),
    "text_encoder_2": Component(("lora_te2_",), ("text_encoder_2.",)),
    "text_encoder_3": Component(("lora_te3_",), ("text_encoder_3.",)),
}
_ANY = ("lycoris_", "lora_")
_GUESS = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "add_embedding."),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
    "text_encoder": ("text_model.",),
}


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


def split_component(key: str) -> tuple[str, str]:
    """(component, the rest) of a dotted key; no component where it names none.

    >>> split_component("text_encoder_2.text_model.x.weight"), split_component("h.0.fc.weight")
    (('text_encoder_2', 'text_model.x.weight'), ('', 'h.0.fc.weight'))
    """
    head, _, rest = key.partition(".")
    return (head, rest) if head in COMPONENTS and rest else ("", key)


def _component_of(key: str) -> str:
    """The first component that a key may be of; empty where it names none."""
    read = (component for component, _, _ in _readings(key) if component)
    return split_component(key)[0] or next(read, "")


def has_home(key: str) -> bool:
    """True for a key that begins with a component, or as in a single-file checkpoint."""
    return bool(split_component(key)[0]) or key.startswith(_DIFFUSION)


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


def guess_component(key: str) -> str:
    """The component that a key without one can only belong to; empty where several could."""
    return next((c for c, starts in _GUESS.items() if key.startswith(starts)), "")


def names_of(base: str | Path) -> tuple[str, ...]:
    """Tensor names of a model's folder or file; of a pipeline's, with the component before them."""
    base = Path(base)
    if not is_pipeline(base):
        return tuple(tensors(base))
    folders = [base / c for c in COMPONENTS if any((base / c).glob("*.safetensors"))]
    return tuple(f"{f.name}.{name}" for f in folders for name in tensors(f))


def is_pipeline(base: str | Path) -> bool:
    """True for a folder of diffusers with one folder a component."""
    return (Path(base) / "model_index.json").is_file()


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


# Names of a Stable Diffusion UNet: those of diffusers → those of the original code (sgm, ldm).
#
# kohya trains SDXL on the original names, so its files hold `lora_unet_input_blocks_4_1_…` for what
# diffusers calls `down_blocks.1.attentions.0.…`. Both UNets (1.x, 2.x, XL) have two layers a block:
#
#     down block B, layer L → input_blocks.(1+3B+L)     its downsampler → input_blocks.(3+3B).0.op
#     up block B, layer L   → output_blocks.(3B+L)      its upsampler   → output_blocks.(3B+2).{1,2}
#     resnets → .0          attentions → .1             mid block → middle_block.0, .1, .2
#
# Facts: diffusers, scripts/convert_original_stable_diffusion_to_diffusers.py; sd-scripts,
# library/sdxl_model_util.py.


_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)(\..+)?")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.([01])(\..+)?")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def sgm_names(module: str) -> tuple[str, ...]:
    """The original names that a module of diffusers' UNet may have; empty for other modules.

    >>> sgm_names("down_blocks.1.attentions.0.proj_in"), sgm_names("mid_block.resnets.1.conv1")
    (('input_blocks.4.1.proj_in',), ('middle_block.2.in_layers.2',))
    >>> sgm_names("up_blocks.0.upsamplers.0.conv")
    ('output_blocks.2.1.conv', 'output_blocks.2.2.conv')
    """
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    if match := _SAMPLER.fullmatch(module):
        block = 3 * int(match[2])
        if match[1] == "down":
            return (f"input_blocks.{3 + block}.0.op",)
        return tuple(f"output_blocks.{2 + block}.{i}.conv" for i in (1, 2))
    if match := _MID.fullmatch(module):
        at = 1 if match[1] == "attentions" else 2 * int(match[2])
        return (f"middle_block.{at}{_inner(match[1], match[3])}",)
    if match := _LAYER.fullmatch(module):
        at = 3 * int(match[2]) + int(match[4])
        side = f"input_blocks.{1 + at}" if match[1] == "down" else f"output_blocks.{at}"
        return (f"{side}.{int(match[3] == 'attentions')}{_inner(match[3], match[5])}",)
    return ()


def _inner(kind: str, rest: str | None) -> str:
    name = (rest or "").removeprefix(".")
    if kind == "resnets":
        name = _RESNET.get(name, name)
    return f".{name}" if name else ""
