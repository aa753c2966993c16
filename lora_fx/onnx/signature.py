"""The inputs of an .onnx file, and sample values at the sizes of a check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_fx.dtypes import Array, from_onnx
from lora_fx.errors import LoraFxError
from lora_fx.inputs import BATCH, SIZES, Input, Inputs, Named
from lora_fx.onnx.range_guards import conditions_of
from lora_fx.onnx.session import RuntimeSession

if TYPE_CHECKING:
    import onnxruntime as ort

IMAGE = 64
"""The height and width of a sampled image if a file leaves them free: smaller ones would vanish
in the strides of most models."""


def signature(session: RuntimeSession) -> Inputs:
    """Return the inputs of a loaded model; names of dimensions become symbols.

    Open heights and widths of images (floats of four dimensions) are IMAGE, as in a capture, where
    they are never dynamic unasked.
    """
    specs = [_input(node) for node in session.inputs]
    inputs = Inputs(tuple(specs), conditions_of(session.metadata, "the model"))
    if len(inputs.others) > 1:
        try:  # many exporters give one length a name for every input
            session.run(inputs.sample())
        except LoraFxError:
            note = f"tried only where {', '.join(inputs.others)} are equal"
            session.note = "; ".join(filter(None, [session.note, note]))
            return inputs.alike()
    return inputs


def _input(node: ort.NodeArg) -> Input:
    """Return one input of the file; a free dimension 0 is the batch."""
    dtype = from_onnx(node.type)
    is_cache = node.name.startswith("past_key_values.")
    is_image = len(node.shape) == 4 and "float" in dtype and not is_cache
    sizes = []
    dimension_names = {}
    for axis, size in enumerate(node.shape):
        if isinstance(size, int):
            sizes.append(size)
        elif is_image and axis > 1:
            sizes.append(IMAGE)
        else:
            sizes.append(2)
            dimension_names[axis] = str(size) if axis else BATCH
    return Input(node.name, dtype, tuple(sizes), dimension_names)


def feeds_of_sizes(inputs: Inputs, user_arrays: Named) -> Iterator[dict[str, Array]]:
    """Yield feeds for every size with different shapes; for one size if a user gives arrays."""
    tried_shapes: list[dict[str, tuple[int, ...]]] = []
    for size in SIZES[:1] if user_arrays else inputs.checks:
        feeds = {**inputs.sample(size), **user_arrays}
        shapes = {name: array.shape for name, array in feeds.items()}
        if shapes not in tried_shapes:
            tried_shapes.append(shapes)
            yield feeds
