"""The probe of a file: an input, and what the outputs were on it for the base and each adapter.

docs/probe.md describes its JSON. Reading it is strict: a probe comes with a file that others made,
and decides what is run and how much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from lora_fx.dtypes import Array, finfo, numpy_dtype
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.strict_json import json_object
from lora_fx.probe.drawn import drawn
from lora_fx.probe.fields import StrictFields
from lora_fx.probe.groups import MOST_GROUPS
from lora_fx.probe.verdict import (
    DIFFERS,
    NOT_FINITE,
    RIGHT,
    TOO_SMALL,
    Gauge,
    Known,
    Verdict,
    verdict_on_adapter,
    verdict_on_base,
)
from lora_fx.text import Json, JsonView, is_whole

PROPERTY = "lora_fx.probe"
"""The name of the probe in the metadata of .onnx, .safetensors and .gguf files."""
MANIFEST = "lora_fx.manifest"
"""The name of the manifest there, which has `starts` where an adapter is an aLoRA."""
FORMAT = 1
MOST_BYTES = 1 << 16
"""The size in bytes of the longest probe."""
MOST_POINTS = 64
MOST_ELEMENTS = 1 << 25
"""The number of elements of all inputs together, above which nothing is run."""
MOST_AXES = 64
MOST_ADAPTERS = 256
"""The number of adapters, each of which is a run, and in mode load a session."""
FULL = "full"
SHORT = "short"
NONE = "none"
KINDS = (FULL, SHORT, NONE)
"""The probes that an export can write: short is without groups of targets."""
MODES = ("merged", "switch", "load", "batch", "train", "adapter")
WITHOUT_BASE = ("merged", "train", "adapter")
"""The modes of files that hold one adapter, which cannot be taken out."""
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "uint16", "uint32", "uint64", "bool",
)  # fmt: skip
AGAIN = "export the file again; or check whether it was edited"
"""The hint for a damaged probe."""

Answers = Mapping[str, Array]
"""The outputs at the points by the name of the adapter; those of the base by an empty name."""
BASE = ""
"""The name of the base among answers."""


@dataclass(frozen=True)
class ProbeInput:
    """One input of a probe; one of `values`, `fill` and `seed` gives its elements.

    Attributes:
        dtype: The name of its dtype.
        shape: Its sizes.
        values: The elements in row-major order.
        fill: The number that every element is.
        seed: The seed of drawn elements.
    """

    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...] | None = None
    fill: float | None = None
    seed: int | None = None

    def array(self) -> Array:
        """Return the tensor."""
        if self.seed is not None:
            return drawn(self.shape, self.dtype, self.seed)
        if self.fill is not None:
            return np.full(self.shape, self.fill, numpy_dtype(self.dtype))
        return np.array(self.values).astype(numpy_dtype(self.dtype)).reshape(self.shape)

    def to_json(self) -> Json:
        """Return the input as a probe has it."""
        data: Json = {"dtype": self.dtype, "shape": list(self.shape)}
        if self.seed is not None:
            data["drawn"] = self.seed
        elif self.fill is not None:
            data["fill"] = self.fill
        else:
            data["values"] = list(self.values or ())
        return data


@dataclass(frozen=True)
class ProbeOutput:
    """One output that is compared.

    Attributes:
        shape: Its sizes.
        largest: The largest magnitude of the base's output.
        tolerance: What a point may differ by, as a share of `largest`.
    """

    shape: tuple[int, ...]
    largest: float
    tolerance: float

    def to_json(self) -> Json:
        """Return the output as a probe has it."""
        return {"shape": list(self.shape), "largest": self.largest, "tolerance": self.tolerance}


@dataclass(frozen=True)
class ProbedAdapter:
    """What a probe knows of one adapter; lists are the outputs at the points.

    Attributes:
        values: With the adapter.
        number: Its number for `adapter_ids`, in mode batch.
        file: The file that holds its tensors, in modes switch and load.
        half: With all of its changes multiplied by 0.5.
        double: With all of its changes multiplied by 2.
        groups: Without some of its targets, by the name of the group.
    """

    values: Array
    number: int | None = None
    file: str | None = None
    half: Array | None = None
    double: Array | None = None
    groups: Mapping[str, Array] = field(default_factory=dict)

    def to_json(self) -> Json:
        """Return the adapter as a probe has it."""
        data: Json = {}
        if self.number is not None:
            data["id"] = self.number
        if self.file is not None:
            data["file"] = self.file
        data["values"] = _numbers(self.values)
        if self.half is not None and self.double is not None:
            data["half"] = _numbers(self.half)
            data["double"] = _numbers(self.double)
        if self.groups:
            data["groups"] = {name: _numbers(values) for name, values in self.groups.items()}
        return data


@dataclass(frozen=True)
class Probe:
    """The probe of a file.

    Attributes:
        mode: merged, switch, load, batch, train or adapter.
        inputs: The inputs of the model, by name.
        outputs: The outputs that are compared, by name.
        points: The name of an output and a row-major index into it, for each number.
        base: The base's outputs at the points, where they are known.
        adapters: What is known of each adapter, by name; in mode batch in the order of their ids.
        base_file: The file beside the model with the tensors of the base, where A and B have no
            defaults.
        precisions: How far outputs move in another precision, as shares of `largest`.
        facts: Versions, processor, provider and hashes, for people.
        language: The question for a server of a language model; see docs/probe.md.
    """

    mode: str
    inputs: Mapping[str, ProbeInput]
    outputs: Mapping[str, ProbeOutput]
    points: Sequence[tuple[str, int]]
    base: Array | None
    adapters: Mapping[str, ProbedAdapter]
    precisions: Mapping[str, float] = field(default_factory=dict)
    facts: JsonView = field(default_factory=dict)
    language: JsonView | None = None
    base_file: str | None = None

    def to_text(self) -> str:
        """Return the probe as JSON."""
        data: Json = {
            "format": FORMAT,
            "mode": self.mode,
            "inputs": {name: value.to_json() for name, value in self.inputs.items()},
            "outputs": {name: value.to_json() for name, value in self.outputs.items()},
            "points": [[name, index] for name, index in self.points],
        }
        if self.base is not None:
            data["base"] = _numbers(self.base)
        data["adapters"] = {name: value.to_json() for name, value in self.adapters.items()}
        if self.base_file is not None:
            data["base_file"] = self.base_file
        if self.precisions:
            data["precisions"] = dict(self.precisions)
        data["facts"] = dict(self.facts)
        if self.language is not None:
            data["language"] = dict(self.language)
        return json.dumps(data, ensure_ascii=False, allow_nan=False)

    @property
    def size(self) -> int:
        """The number of bytes of its JSON."""
        return len(self.to_text().encode())

    @classmethod
    def from_text(cls, text: str | bytes, where: str) -> Probe:
        """Parse the JSON of a probe.

        Args:
            text: UTF-8 where it is bytes.
            where: The file, for messages.

        Raises:
            LoraFxError: It is longer than MOST_BYTES, of another format, or damaged.
        """
        place = f"{where}: its probe"
        size = len(text.encode() if isinstance(text, str) else text)
        if size > MOST_BYTES:
            raise LoraFxError(f"{place} has {size} bytes; expected at most {MOST_BYTES}", AGAIN)
        data = json_object(text, place, hint=AGAIN)
        number = data.get("format")
        if number != FORMAT or not is_whole(number):
            raise LoraFxError(
                f"{place} has the format {one_line(repr(number), 40)}; expected {FORMAT}",
                "install a newer lora-fx; or export the file again",
            )
        return _Reader(place, AGAIN).probe(data)

    def feeds(self) -> dict[str, Array]:
        """Return the inputs by name."""
        return {name: value.array() for name, value in self.inputs.items()}

    def at_points(self, outputs: Mapping[str, Array], where: str) -> Array:
        """Return the numbers of a run at the points, in float64.

        Raises:
            LoraFxError: The run lacks an output, or has one of another shape.
        """
        for name, output in self.outputs.items():
            shape = outputs[name].shape if name in outputs else None
            if shape != output.shape:
                found = "no such output" if shape is None else str(list(shape))
                raise LoraFxError(
                    f"{where}: the probe has output {one_line(name, 80)!r} "
                    f"{list(output.shape)}; the run has {found}",
                    AGAIN,
                )
        numbers = [outputs[name].reshape(-1)[index] for name, index in self.points]
        return np.array(numbers, np.float64)

    def gauge(self) -> Gauge:
        """Return how numbers at the points are compared."""
        outputs = [self.outputs[name] for name, _ in self.points]
        return Gauge(
            np.array([output.largest for output in outputs]),
            np.array([output.tolerance for output in outputs]),
            self.precisions,
            max(output.tolerance for output in self.outputs.values()),
        )

    def known(self, name: str) -> Known:
        """Return what is known of an adapter."""
        adapter = self.adapters[name]
        others = {other: of.values for other, of in self.adapters.items() if other != name}
        return Known(
            adapter.values, self.base, others, adapter.groups, adapter.half, adapter.double
        )

    def effect(self, name: str, found: Array | None = None, base: Array | None = None) -> float:
        """Return an adapter's largest change of a point, as a share of the output's largest.

        Args:
            name: The adapter.
            found: A run with it; by default what is expected.
            base: A run of the base; by default what is expected.
        """
        with_adapter = self.adapters[name].values if found is None else found
        without = self.base if base is None else base
        if without is None:
            return math.nan
        return self.gauge().distance(with_adapter, without)

    def verdicts(self, answers: Answers) -> dict[str, Verdict]:
        """Return the verdict on each run, by the name of its adapter."""
        gauge = self.gauge()
        verdicts: dict[str, Verdict] = {}
        if BASE in answers and self.base is not None:
            values = {name: adapter.values for name, adapter in self.adapters.items()}
            verdicts[BASE] = verdict_on_base(answers[BASE], self.base, values, gauge)
        base_is_right = verdicts.get(BASE, Verdict(RIGHT)).is_right
        for name in self.adapters:
            if name not in answers:
                continue
            verdict = verdict_on_adapter(answers[name], self.known(name), gauge)
            names_no_cause = verdict.is_right or verdict in (TOO_SMALL, NOT_FINITE)
            verdicts[name] = verdict if base_is_right or names_no_cause else Verdict(DIFFERS)
        return verdicts

    def with_every_other_point(self) -> Probe:
        """Return the probe with half of its points."""
        adapters = {}
        for name, adapter in self.adapters.items():
            groups = {group: values[::2] for group, values in adapter.groups.items()}
            half = None if adapter.half is None else adapter.half[::2]
            double = None if adapter.double is None else adapter.double[::2]
            adapters[name] = replace(
                adapter, values=adapter.values[::2], half=half, double=double, groups=groups
            )
        base = None if self.base is None else self.base[::2]
        return replace(self, points=self.points[::2], base=base, adapters=adapters)

    def without_groups(self) -> Probe:
        """Return the short form of the probe."""
        short = {name: replace(value, groups={}) for name, value in self.adapters.items()}
        return replace(self, adapters=short)


T = TypeVar("T")


NO_PROBE = (
    "export it again: lora-fx export writes a probe unless --probe none is given; or compare it "
    "with the model: lora-fx verify FILE MODEL"
)
"""The hint for a file without a probe."""
NO_PROBE_OF_ALORA = (
    "it holds an aLoRA, which acts from its invocation tokens on, and a probe has one input for "
    "the base and all adapters: export proves such a file while it is written, so export it again "
    "where it has to be proven"
)
"""The hint for a file with an aLoRA."""


def probe_in(metadata: Mapping[str, str], where: str) -> Probe:
    """Parse the probe in a file's metadata.

    Raises:
        LoraFxError: There is none, or a damaged one.
    """
    text = metadata.get(PROPERTY)
    if text is None:
        manifest = json_object(metadata.get(MANIFEST, "{}"), f"{where}: {MANIFEST}")
        hint = NO_PROBE_OF_ALORA if "starts" in manifest else NO_PROBE
        raise LoraFxError(f"{where}: it has no probe", hint)
    return Probe.from_text(text, where)


class _Reader(StrictFields):
    """The strict reading of a probe's JSON."""

    def probe(self, data: JsonView) -> Probe:
        mode = data.get("mode")
        if mode not in MODES:
            raise self._error("mode", mode, f"one of {', '.join(MODES)}")
        inputs = self._table(data, "inputs", self._input)
        outputs = self._table(data, "outputs", self._output)
        # sizes of 0 count as 1: numpy makes no array of an empty shape whose other sizes are huge
        elements = sum(math.prod(max(1, size) for size in value.shape) for value in inputs.values())
        if elements > MOST_ELEMENTS:
            raise self._error("inputs", f"{elements} elements", f"at most {MOST_ELEMENTS}")
        points = self._points(data.get("points"), outputs)
        count = len(points)
        base = self._optional(data, "base", count)
        adapters = self._table(
            data, "adapters", lambda name, value: self._adapter(name, value, count)
        )
        if BASE in adapters:
            raise self._error("adapters", "an empty name", "names")
        files = [adapter.file for adapter in adapters.values() if adapter.file is not None]
        numbers = [adapter.number for adapter in adapters.values() if adapter.number is not None]
        for name, values in (("file", files), ("id", numbers)):
            if len(set(values)) < len(values):
                raise self._error(f"adapters.{name}", "one of two", "another for each adapter")
        if len(adapters) > MOST_ADAPTERS:
            raise self._error("adapters", f"{len(adapters)} of them", f"at most {MOST_ADAPTERS}")
        if mode in WITHOUT_BASE and len(adapters) > 1:
            raise self._error("adapters", f"{len(adapters)} of them", f"one in mode {mode}")
        precisions = self._table(data, "precisions", self._positive, needed=False)
        facts = data.get("facts", {})
        language = data.get("language")
        for name, value in (("facts", facts), ("language", language or {})):
            if not isinstance(value, dict):
                raise self._error(name, value, "an object")
        base_file = self._file("base_file", data.get("base_file"))
        return Probe(
            str(mode), inputs, outputs, points, base, adapters, precisions, facts, language,
            base_file,
        )  # fmt: skip

    def _input(self, name: str, value: Any) -> ProbeInput:
        fields = self._fields(name, value)
        dtype = fields.get("dtype")
        if dtype not in DTYPES:
            raise self._error(f"{name}.dtype", dtype, "the name of a dtype")
        shape = self._shape(name, fields)
        sources = [field for field in ("values", "fill", "drawn") if field in fields]
        if len(sources) != 1:
            raise self._error(name, sources, "one of values, fill and drawn")
        source = fields[sources[0]]
        if sources == ["values"]:
            numbers = self._list(f"{name}.values", source, math.prod(shape))
            self._check_range(f"{name}.values", numbers, dtype)
            return ProbeInput(dtype, shape, values=tuple(numbers))
        if sources == ["fill"]:
            number = self._number(f"{name}.fill", source)
            self._check_range(f"{name}.fill", [number], dtype)
            return ProbeInput(dtype, shape, fill=number)
        if not is_whole(source) or not 0 <= source < 1 << 32 or "float" not in dtype:
            raise self._error(f"{name}.drawn", source, "a seed of 32 bits, for a float dtype")
        return ProbeInput(dtype, shape, seed=int(source))

    def _check_range(self, name: str, numbers: Sequence[float], dtype: str) -> None:
        """Raise for a number that a dtype of integers does not hold."""
        if "float" in dtype:
            if any(abs(number) > float(finfo(dtype).max) for number in numbers):
                raise self._error(name, max(numbers, key=abs), f"numbers of {dtype}")
            return
        least, most = 0, 1
        if dtype != "bool":
            limits = np.iinfo(dtype)
            least, most = int(limits.min), int(limits.max)
        for number in numbers:
            if not is_whole(number) or not least <= number <= most:
                raise self._error(name, number, f"a number of {dtype}")

    def _output(self, name: str, value: Any) -> ProbeOutput:
        fields = self._fields(name, value)
        largest = self._positive(f"{name}.largest", fields.get("largest"))
        tolerance = self._positive(f"{name}.tolerance", fields.get("tolerance"))
        if largest * tolerance == 0:  # they are divisors
            raise self._error(f"{name}.tolerance", tolerance, "a larger number")
        return ProbeOutput(self._shape(name, fields), largest, tolerance)

    def _adapter(self, name: str, value: Any, count: int) -> ProbedAdapter:
        fields = self._fields(name, value)
        number = fields.get("id")
        if number is not None and (not is_whole(number) or not 0 < number < 1 << 31):
            raise self._error(f"{name}.id", number, "a whole number from 1")
        file = self._file(f"{name}.file", fields.get("file"))
        groups = self._table(
            fields, "groups", lambda group, numbers: self._values(group, numbers, count),
            needed=False,
        )  # fmt: skip
        if len(groups) > MOST_GROUPS:
            raise self._error(f"{name}.groups", f"{len(groups)} of them", f"at most {MOST_GROUPS}")
        values = self._values(f"{name}.values", fields.get("values"), count)
        half = self._optional(fields, "half", count)
        double = self._optional(fields, "double", count)
        return ProbedAdapter(values, number, file, half, double, groups)

    def _file(self, name: str, value: Any) -> str | None:
        if value is not None and not _is_file_name(value):
            raise self._error(name, value, "the name of a file in the same folder")
        return None if value is None else str(value)

    def _points(
        self, value: Any, outputs: Mapping[str, ProbeOutput]
    ) -> tuple[tuple[str, int], ...]:
        if not isinstance(value, list) or not 0 < len(value) <= MOST_POINTS:
            found = f"{len(value)} of them" if isinstance(value, list) else value
            raise self._error("points", found, f"1 to {MOST_POINTS}")
        points = []
        for point in value:
            if not isinstance(point, list) or len(point) != 2 or not isinstance(point[0], str):
                raise self._error("points", point, "the name of an output and an index")
            name, index = point
            output = outputs.get(name)
            if output is None or not is_whole(index) or not 0 <= index < math.prod(output.shape):
                raise self._error("points", point, "an index into one of the outputs")
            points.append((name, int(index)))
        return tuple(points)

    def _shape(self, name: str, fields: JsonView) -> tuple[int, ...]:
        shape = fields.get("shape")
        is_shape = isinstance(shape, list) and len(shape) <= MOST_AXES
        if not is_shape or not all(is_whole(size) and 0 <= size < 1 << 31 for size in shape or ()):
            raise self._error(f"{name}.shape", shape, f"at most {MOST_AXES} sizes")
        return tuple(shape or ())


def _is_file_name(name: object) -> bool:
    """Whether a text is the name of a file in the same folder."""
    if not isinstance(name, str) or not name or name in (".", ".."):
        return False
    return not any(character in name for character in "/\\\0:")


def _numbers(values: Array) -> list[float]:
    """Return numbers as JSON has them, in nine digits, which hold every float32."""
    return [float(f"{value:.9g}") for value in values.tolist()]
