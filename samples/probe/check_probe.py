"""Check an .onnx file of lora-fx against the probe that it carries.

    pip install numpy onnxruntime
    python check_probe.py model.onnx

This needs neither lora-fx nor the model that the file was made from. docs/probe.md has the format
and the rules of the verdict; its sections are marked here. The adapters of a file of mode switch or
load lie beside it. Printed is one JSON object, such as

    {"base": "right", "adapters": {"de": "right", "fr": "no effect"}}

The exit code is 0 if all are right, or too small to tell; 1 if one is not; and 2 with one line on
stderr if the file has no probe, a damaged one, or cannot be run. With --any-precision, "right in
bfloat16" is right too.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

MOST_BYTES = 65536
MOST_POINTS = 64
MOST_GROUPS = 16
MOST_AXES = 64
FEWEST_MOVED = 8
"""The fewest points that an adapter has to move for a scale to be told."""
MOST_ELEMENTS = 1 << 25
"""The most elements of all inputs together."""
MODES = ("merged", "switch", "load", "batch")
"""The modes of files that this program runs."""
FLOATS = ("bfloat16", "float16", "float32", "float64")
BFLOAT16 = 16
"""The number of bfloat16 in ONNX; numpy has none."""
LARGEST_WHOLE = 2**53
"""Larger whole numbers are not exact in every language's JSON."""
RANGES = {
    "bool": (0, 1),
    "int8": (-(2**7), 2**7 - 1),
    "uint8": (0, 2**8 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "uint32": (0, 2**32 - 1),
    "int64": (-LARGEST_WHOLE, LARGEST_WHOLE),
    "uint64": (0, LARGEST_WHOLE),
}
SAFETENSORS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}

TOO_SMALL = "too small to tell"
NO_CAUSE = (TOO_SMALL, "not finite")
"""The verdicts that hold for an adapter whatever the base is."""

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]


class ProbeError(Exception):
    """The file has no probe, a damaged one, or cannot be run."""


def require(condition: bool, message: str) -> None:
    """Raise ProbeError unless the condition holds."""
    if not condition:
        raise ProbeError(f"the probe is damaged: {message}")


# The object


def read_probe(text: str) -> dict[str, Any]:
    """Parse and check the text of a probe.

    Raises:
        ProbeError: It is too long, of another format, or not as docs/probe.md says.
    """
    length = len(text.encode())
    if length > MOST_BYTES:
        raise ProbeError(f"the probe has {length} bytes; at most {MOST_BYTES} are read")
    try:
        probe = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(probe, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ProbeError("the probe is damaged: it is no JSON") from error
    require(isinstance(probe, dict), "it is no object")
    check_probe(probe)
    return dict(probe)


def check_probe(probe: dict[str, Any]) -> None:
    """Raise ProbeError unless this program can check a file by the probe.

    `precisions`, and `groups` of adapters, are added where they are absent.
    """
    version = probe.get("format")
    require(_is_whole(version, 0, LARGEST_WHOLE), "format is no whole number")
    if version != 1:
        raise ProbeError(f"the probe has format {version:.0f}; this program reads format 1")
    mode = probe.get("mode")
    if mode not in MODES:
        raise ProbeError(f"the probe has mode {mode}; this program reads {', '.join(MODES)}")
    for key in ("inputs", "outputs", "adapters"):
        require(isinstance(probe.get(key), dict), f"{key} is no object")
    check_inputs(probe["inputs"])
    check_outputs(probe["outputs"])
    check_points(probe.get("points"), probe["outputs"])

    if "base" in probe:
        check_values(probe["base"], probe, "base")
    if "base_file" in probe:
        check_file(probe["base_file"], "base_file")
    for name, adapter in probe["adapters"].items():
        check_adapter(name, adapter, probe)
    if mode == "merged":
        require(len(probe["adapters"]) <= 1, "a merged file has one adapter at most")
    require("base" in probe or len(probe["adapters"]) > 0, "it has no values")

    precisions = probe.setdefault("precisions", {})
    require(isinstance(precisions, dict), "precisions is no object")
    for name, level in precisions.items():
        require(_is_number(level) and level > 0, f"precision {name} is not above 0")


def check_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise ProbeError unless every input can be made, within MOST_ELEMENTS for all together."""
    total = 0
    for name, described in inputs.items():
        require(isinstance(described, dict), f"input {name} is no object")
        dtype = str(described.get("dtype"))
        if dtype not in RANGES and dtype not in FLOATS:
            raise ProbeError(f"input {name}: this program makes no tensors of dtype {dtype}")
        count = checked_size(described.get("shape"), f"input {name}")
        total += count
        require(total <= MOST_ELEMENTS, f"inputs of more than {MOST_ELEMENTS} elements")
        content = [key for key in ("values", "fill", "drawn") if key in described]
        require(len(content) == 1, f"input {name} has not one of values, fill and drawn")

        if content == ["drawn"]:
            require(dtype in FLOATS, f"input {name} of dtype {dtype} is drawn")
            require(_is_whole(described["drawn"], 0, 2**32 - 1), f"the seed of input {name}")
            continue
        elements = described["values"] if content == ["values"] else [described["fill"]]
        expected = count if content == ["values"] else 1
        require(isinstance(elements, list), f"the values of input {name} are no list")
        require(len(elements) == expected, f"input {name} has {len(elements)} values")
        for element in elements:
            fits = _is_number(element) if dtype in FLOATS else _is_whole(element, *RANGES[dtype])
            require(fits, f"an element of input {name} is no {dtype}")


def checked_size(shape: Any, what: str) -> int:
    """Return the number of elements of a shape."""
    require(isinstance(shape, list) and len(shape) <= MOST_AXES, f"the shape of {what}")
    for size in shape:
        require(_is_whole(size, 0, LARGEST_WHOLE), f"the shape of {what}")
    return math.prod(int(size) for size in shape)


def check_outputs(outputs: Mapping[str, Any]) -> None:
    """Raise ProbeError unless every output has a shape, a magnitude and a tolerance."""
    for name, described in outputs.items():
        require(isinstance(described, dict), f"output {name} is no object")
        checked_size(described.get("shape"), f"output {name}")
        for key in ("largest", "tolerance"):
            number = described.get(key)
            require(_is_number(number) and number > 0, f"{key} of output {name} is not above 0")
        smallest = described["largest"] * described["tolerance"]
        require(smallest > 0, f"the tolerance of output {name} is too small")


def check_points(points: Any, outputs: Mapping[str, Any]) -> None:
    """Raise ProbeError unless every point lies in an output."""
    require(isinstance(points, list) and 1 <= len(points) <= MOST_POINTS, "1 to 64 points")
    for point in points:
        require(isinstance(point, list) and len(point) == 2, "a point is no pair")
        name, index = point
        require(isinstance(name, str) and name in outputs, "a point is in no output")
        size = checked_size(outputs[name]["shape"], f"output {name}")
        require(_is_whole(index, 0, size - 1), f"a point lies outside of output {name}")


def check_adapter(name: str, adapter: Any, probe: Mapping[str, Any]) -> None:
    """Raise ProbeError unless an adapter has what a file of this mode needs."""
    require(isinstance(adapter, dict), f"adapter {name} is no object")
    check_values(adapter.get("values"), probe, f"adapter {name}")
    for key in ("half", "double"):
        if key in adapter:
            check_values(adapter[key], probe, f"{key} of adapter {name}")
    groups = adapter.setdefault("groups", {})
    require(isinstance(groups, dict), f"the groups of adapter {name} are no object")
    require(len(groups) <= MOST_GROUPS, f"adapter {name} has more than {MOST_GROUPS} groups")
    for group, values in groups.items():
        check_values(values, probe, f"group {group} of adapter {name}")
    if probe["mode"] == "batch":
        require(_is_whole(adapter.get("id"), 1, LARGEST_WHOLE), f"the id of adapter {name}")
    if probe["mode"] in ("switch", "load"):
        check_file(adapter.get("file"), f"the file of adapter {name}")


def check_file(name: Any, what: str) -> None:
    """Raise ProbeError unless a name is that of a file beside the model."""
    require(isinstance(name, str) and name not in ("", ".", ".."), what)
    require(not any(sign in name for sign in "/\\:\0"), f"{what} does not lie beside the model")


def check_values(values: Any, probe: Mapping[str, Any], what: str) -> None:
    """Raise ProbeError unless a list has a number for every point."""
    points = len(probe["points"])
    require(isinstance(values, list) and len(values) == points, f"{what}: not {points} values")
    require(all(_is_number(value) for value in values), f"{what}: a value is no number")


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN, and exact for huge integers


def _is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a JSON value is a whole number in a range; 2.0 is one."""
    return _is_number(value) and low <= value <= high and value == int(value)


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python's json accepts."""
    raise ValueError(name)


# The inputs


def tensor(described: Mapping[str, Any]) -> Array | ort.OrtValue:
    """Return the input that an entry of `inputs` describes."""
    if described["dtype"] == "bfloat16":
        return bfloat16(array_of(described, "float32"))
    return array_of(described, described["dtype"])


def array_of(described: Mapping[str, Any], dtype: str) -> Array:
    """Return the elements of an input in a dtype of numpy."""
    shape = tuple(int(size) for size in described["shape"])
    if "fill" in described:
        return np.full(shape, described["fill"], dtype)
    if "values" in described:
        return np.array(described["values"], dtype).reshape(shape)
    return drawn(math.prod(shape), int(described["drawn"])).reshape(shape).astype(dtype)


def bfloat16(array: Array) -> ort.OrtValue:
    """Return a float32 array, rounded to the nearest bfloat16: the upper 16 bits."""
    bits = array.view(np.uint32)
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(rounded.astype(np.uint16), BFLOAT16)


def drawn(count: int, seed: int) -> Array:
    """Return the elements of a seed; products of uint32 arrays wrap around."""
    offset = np.uint32(seed * 0x85EBCA6B % 2**32)
    x = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x9E3779B1) + offset
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    return ((x >> np.uint32(20)).astype(np.float32) - 2048) / 1024


# The runs


class File:
    """An .onnx file, its probe, and runs of it.

    Attributes:
        probe: The checked probe.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session = self._opened({})
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "lora_fx.probe" not in metadata:
            raise ProbeError(f"{path}: the file has no probe")
        self._manifest = metadata.get("lora_fx.manifest", "")
        self.probe = read_probe(metadata["lora_fx.probe"])
        self._inputs = {name: tensor(described) for name, described in self.probe["inputs"].items()}

    def base(self) -> Array:
        """Return the outputs of the base at the points; of a merged file those that it has."""
        mode = self.probe["mode"]
        if mode == "batch":
            return self._run_with_id(0)
        if "base_file" in self.probe:
            base = self._path.parent / self.probe["base_file"]
            return self._run(self._session, read_safetensors(base))
        return self._run(self._session, {})

    def adapter(self, name: str) -> Array:
        """Return the outputs with an adapter at the points."""
        mode = self.probe["mode"]
        fields = self.probe["adapters"][name]
        if mode == "batch":
            return self._run_with_id(int(fields["id"]))
        if mode == "merged":
            return self._run(self._session, {})

        file = self._path.parent / fields["file"]
        if not file.is_file():
            raise ProbeError(f"{file}: the file of adapter {name} is missing")
        if mode == "load":
            return self._run(self._opened(self._padded(file)), {})
        if "base_file" in self.probe:
            return self._run(self._session, read_safetensors(file))
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
        options = ort.RunOptions()
        options.add_active_adapter(adapter)
        return self._run(self._session, {}, options)

    def beyond_ids(self) -> Array | None:
        """Return the outputs for an id that no adapter has, or None where the runtime refuses."""
        ids = [adapter["id"] for adapter in self.probe["adapters"].values()]
        try:
            return self._run_with_id(int(max(ids, default=0)) + 1)
        except Exception:  # the runtime's own errors have no common base
            return None

    def _opened(self, initializers: Tensors) -> ort.InferenceSession:
        """Open the file, with other tensors for some of its initializers."""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in initializers.values()]
        options.add_external_initializers(list(initializers), values)
        return ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])

    def _run_with_id(self, number: int) -> Array:
        """Run a file of mode batch with one id for every row, and with the scale 1."""
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        [batch] = shapes.pop("adapter_ids")
        rowed = [name for name, shape in shapes.items() if shape and shape[0] == batch]
        inputs = self.probe["inputs"]
        rows = next(int(inputs[name]["shape"][0]) for name in rowed if name in inputs)
        tensors = {"adapter_ids": np.full(rows, number, np.int64)}
        if "adapter_scales" in shapes:
            tensors["adapter_scales"] = np.ones(rows, np.float32)
        return self._run(self._session, tensors)

    def _run(
        self, session: ort.InferenceSession, tensors: Tensors, options: ort.RunOptions | None = None
    ) -> Array:
        """Run, with tensors beside the probe's inputs, and return the outputs at the points."""
        outputs = self.probe["outputs"]
        names = list(dict.fromkeys(name for name, _ in self.probe["points"]))
        arrays = dict(
            zip(names, session.run(names, {**self._inputs, **tensors}, options), strict=True)
        )
        for name, array in arrays.items():
            if list(array.shape) != outputs[name]["shape"]:
                raise ProbeError(
                    f"output {name} is {list(array.shape)}, in the probe {outputs[name]['shape']}"
                )
        found = [arrays[name].reshape(-1)[int(index)] for name, index in self.probe["points"]]
        return np.array(found, np.float64)

    def _padded(self, file: Path) -> Tensors:
        """Return the tensors of an .onnx_adapter in the rank that the file of mode load has.

        Zeros added to the rank of A [*batch, in, rank] and B [*batch, rank, out] change no product.
        """
        parameters = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
        padded: Tensors = {}
        for slot in json.loads(self._manifest)["slots"].values():
            for name, axis in ((slot["a"], -1), (slot["b"], -2)):
                if name in parameters:
                    array = parameters[name].numpy()
                    padded[name] = np.pad(array, {axis: (0, slot["rank"] - array.shape[axis])})
        return padded


def read_safetensors(path: Path) -> Tensors:
    """Return the tensors of a file: 8 bytes of length, a JSON header, and the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors: Tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            array = np.frombuffer(data[start + begin : start + end], SAFETENSORS[entry["dtype"]])
            tensors[name] = array.reshape(entry["shape"])
    return tensors


# The verdict


class Gauge:
    """How lists of numbers at the points are compared."""

    def __init__(self, probe: Mapping[str, Any]) -> None:
        outputs = [probe["outputs"][name] for name, _ in probe["points"]]
        self.largest = np.array([output["largest"] for output in outputs], np.float64)
        self._tolerance = np.array([output["tolerance"] for output in outputs], np.float64)
        self.largest_tolerance = max(of["tolerance"] for of in probe["outputs"].values())
        self.precisions: list[tuple[str, float]] = sorted(
            probe["precisions"].items(), key=lambda row: row[1]
        )

    def distance(self, one: Array, other: Array) -> float:
        return _largest_ratio(one, other, self.largest)

    def excess(self, one: Array, other: Array) -> float:
        return _largest_ratio(one, other, self.largest * self._tolerance)

    def moved(self, one: Array, other: Array) -> int:
        """Return how many points lie apart by more than their tolerance."""
        return int((np.abs(one - other) > self.largest * self._tolerance).sum())


def _largest_ratio(one: Array, other: Array, scale: Array) -> float:
    return float((np.abs(one - other) / scale).max())


@dataclass
class Runs:
    """The outputs at the points.

    Attributes:
        base: Those of the base; None where it was not run.
        adapters: Those with each adapter, by its name.
        beyond_ids: In mode batch, those for an id that no adapter has; None where the runtime
            refuses it.
    """

    base: Array | None = None
    adapters: Tensors = field(default_factory=dict)
    beyond_ids: Array | None = None


@np.errstate(over="ignore", invalid="ignore")  # what a file says may be so large
def verdicts(probe: Mapping[str, Any], runs: Runs) -> dict[str, Any]:
    """Return the verdicts on the base, on each adapter, and in mode batch on the ids."""
    result: dict[str, Any] = {}
    base_is_right = True
    if runs.base is not None and "base" in probe:
        causes = {f"adapter {name}": fields["values"] for name, fields in probe["adapters"].items()}
        result["base"] = verdict(runs.base, floats(probe["base"]), causes, Gauge(probe))
        base_is_right = is_right(result["base"], any_precision=True)
    if probe["mode"] == "batch":
        is_checked = runs.beyond_ids is None or np.isnan(runs.beyond_ids).all()
        result["ids"] = "right" if is_checked else "ids are not checked"

    result["adapters"] = {}
    for name, outputs in runs.adapters.items():
        answer = verdict_on_adapter(outputs, name, probe)
        names_no_cause = is_right(answer, any_precision=True) or answer in NO_CAUSE
        if not base_is_right and not names_no_cause:
            answer = "differs"
        result["adapters"][name] = answer
    return result


def verdict_on_adapter(found: Array, name: str, probe: Mapping[str, Any]) -> str:
    """Return the verdict on a run with an adapter."""
    adapter = probe["adapters"][name]
    base = probe.get("base")
    causes: dict[str, Sequence[float]] = {}
    if base is not None:
        causes["no effect"] = base
    for other, fields in probe["adapters"].items():
        if other != name:
            causes[f"adapter {other}"] = fields["values"]
    for group, values in adapter["groups"].items():
        causes[f"without {group}"] = values
    if "half" in adapter:
        causes["scaled by 0.5"] = adapter["half"]
    if "double" in adapter:
        causes["scaled by 2"] = adapter["double"]

    gauge = Gauge(probe)
    expected = floats(adapter["values"])
    effect = math.inf if base is None else gauge.distance(expected, floats(base))
    near_one = None if base is None else scale_near_one(found, floats(base), expected, gauge)
    answer = verdict(found, expected, causes, gauge, effect, near_one)
    if answer == "right" and effect <= 2 * gauge.largest_tolerance:
        return TOO_SMALL
    if answer == "differs" and base is not None and {"half", "double"} <= adapter.keys():
        scale = fitted_scale(found, floats(base), adapter, gauge)
        return "differs" if scale is None else f"scaled by {scale:g}"
    return answer


def verdict(
    found: Array,
    expected: Array,
    causes: Mapping[str, Sequence[float]],
    gauge: Gauge,
    effect: float = math.inf,
    near_one: float | None = None,
) -> str:
    """Return the verdict by rules 1 to 5, and `differs` where these have none.

    Args:
        found: The outputs at the points.
        expected: What they should be.
        causes: The other known lists by the name of the cause.
        gauge: How lists are compared.
        effect: The distance of the adapter and the base. A precision is not told where it is less
            than four times the precision's level.
        near_one: The scale near 1 that explains `found`, where one does.
    """
    if not np.isfinite(found).all():
        return "not finite"
    if gauge.excess(found, expected) <= 1:
        return "right"
    names = [name for name, values in causes.items() if gauge.excess(found, floats(values)) <= 1]
    if names:
        return " or ".join(names)
    if near_one is not None:
        return f"scaled by {near_one:g}"
    distances = {name: gauge.distance(found, floats(values)) for name, values in causes.items()}
    for precision, level in gauge.precisions:
        if effect <= 4 * level:
            continue
        if gauge.distance(found, expected) <= level:
            return f"right in {precision}"
        names = [name for name, distance in distances.items() if distance <= level]
        if names:
            return f"{' or '.join(names)} in {precision}"
    return "differs"


def scale_near_one(found: Array, base: Array, values: Array, gauge: Gauge) -> float | None:
    """Return the scale within 0.1 of 1 that explains the outputs, by rule 4, or None."""
    if gauge.moved(values, base) < FEWEST_MOVED or not np.isfinite(found).all():
        return None
    effect = (values - base) / gauge.largest
    difference = (found - values) / gauge.largest
    share = float((difference * effect).sum() / (effect * effect).sum())
    if not abs(share) <= 0.1:
        return None
    explains = np.abs(difference - share * effect).max() <= np.abs(difference).max() / 8
    scale = math.floor(100 * (1 + share) + 0.5) / 100
    return scale if explains and scale != 1 else None


def fitted_scale(
    found: Array, base: Array, adapter: Mapping[str, Any], gauge: Gauge
) -> float | None:
    """Return the scale of the adapter that explains the outputs, by rule 6, or None.

    Scales are counted in hundredths, because 0.9 and 1.1 have no exact distance of 0.1 to 1.
    """
    values = floats(adapter["values"])
    half = floats(adapter["half"])
    double = floats(adapter["double"])
    if gauge.moved(values, base) < FEWEST_MOVED:
        return None
    nearest, least = 0, math.inf
    for hundredths in range(10, 301):
        s = hundredths / 100
        cubic = (
            -(s - 0.5) * (s - 1) * (s - 2) * base
            + s * (s - 1) * (s - 2) / 0.375 * half
            - 2 * s * (s - 0.5) * (s - 2) * values
            + s * (s - 0.5) * (s - 1) / 3 * double
        )
        distance = gauge.distance(found, cubic)
        if distance < least:
            nearest, least = hundredths, distance
    explains = least <= 0.02 * gauge.distance(values, base)
    is_better = least <= gauge.distance(found, values) / 8
    is_other_scale = nearest > 0 and abs(nearest - 100) > 10
    return nearest / 100 if explains and is_better and is_other_scale else None


def floats(values: Sequence[float]) -> Array:
    """Return a list of the probe as an array."""
    return np.array(values, np.float64)


def check(path: Path) -> dict[str, Any]:
    """Run a file and return its verdicts.

    Raises:
        ProbeError: The file has no probe, or a damaged one.
    """
    file = File(path)
    probe = file.probe
    runs = Runs()
    if "base" in probe and (probe["mode"] != "merged" or not probe["adapters"]):
        runs.base = file.base()
    for name in probe["adapters"]:
        runs.adapters[name] = file.adapter(name)
    if probe["mode"] == "batch":
        runs.beyond_ids = file.beyond_ids()
    return verdicts(probe, runs)


def main(arguments: Sequence[str]) -> int:
    """Check the file that is named, print the verdicts, and return the exit code."""
    options = [argument for argument in arguments if argument == "--any-precision"]
    paths = [argument for argument in arguments if argument not in options]
    if len(paths) != 1:
        print("Error: python check_probe.py [--any-precision] MODEL.onnx", file=sys.stderr)
        return 2
    try:
        result = check(Path(paths[0]))
    except Exception as error:  # the runtime's own errors have no common base
        escaped = json.dumps(str(error) or type(error).__name__)[1:-1]
        print(f"Error: {escaped[:400]}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    answers = [result.get("base", "right"), result.get("ids", "right")]
    answers += [answer for answer in result["adapters"].values() if answer != TOO_SMALL]
    return 0 if all(is_right(answer, bool(options)) for answer in answers) else 1


def is_right(answer: str, any_precision: bool) -> bool:
    """Whether a verdict is `right`, in any precision if that is enough."""
    return answer == "right" or (any_precision and answer.startswith("right in "))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
