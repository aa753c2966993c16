"""The inputs of an .onnx file, and samples of them at the sizes at which it is tried."""

from __future__ import annotations

from collections.abc import Iterator

from lora_fx.dtypes import Array, from_onnx
from lora_fx.errors import LoraFxError
from lora_fx.inputs import BATCH, SIZES, Input, Inputs, Named
from lora_fx.onnx.manifest import conditions_of
from lora_fx.onnx.session import RuntimeSession

IMAGE = 64
"""The height and width of a sampled image where a file leaves them open: smaller ones would vanish
in the strides of most models."""


def signature(session: RuntimeSession) -> Inputs:
    """The inputs of a loaded model; names of dimensions become symbols.

    Open heights and widths of images (floats of four dimensions) are IMAGE, as in a capture, where
    they are never dynamic unasked.
    """
    specs = []
    for i in session.session.get_inputs():
        dtype = from_onnx(i.type)
        image = len(i.shape) == 4 and "float" in dtype and not i.name.startswith("past_key_values.")
        sizes = [IMAGE if image and k > 1 and not isinstance(d, int) else d
                 for k, d in enumerate(i.shape)]  # fmt: skip
        shape = tuple(d if isinstance(d, int) else 2 for d in sizes)
        dims = {k: str(d) if k else BATCH for k, d in enumerate(sizes) if not isinstance(d, int)}
        specs.append(Input(i.name, dtype, shape, dims))
    inputs = Inputs(tuple(specs), conditions_of(session.metadata, "the model"))
    if len(inputs.others) > 1:
        try:  # many exporters give one length a name for every input
            session.run(inputs.sample())
        except LoraFxError:
            equal = f"tried only where {', '.join(inputs.others)} are equal"
            session.note = f"{session.note}; {equal}" if session.note else equal
            return inputs.alike()
    return inputs


def feeds_of_sizes(inputs: Inputs, given: Named) -> Iterator[dict[str, Array]]:
    """Feeds of every size at which shapes differ; of one where arrays of a user are given."""
    seen: list[dict[str, tuple[int, ...]]] = []
    for size in SIZES[:1] if given else inputs.checks:
        feeds = {**inputs.sample(size), **given}
        shapes = {name: array.shape for name, array in feeds.items()}
        if shapes not in seen:
            seen.append(shapes)
            yield feeds
