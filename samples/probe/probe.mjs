// The probe of an .onnx file of lora-fx: read it, make its inputs, and judge
// what a runtime computed. check_probe.mjs uses it in node, and ../web in a
// browser. docs/probe.md has the format and the rules of the verdict.
//
// Objects of the probe are Maps: a Map keeps the order of names like "10".

const MOST_BYTES = 65536;
const MOST_POINTS = 64;
const MOST_GROUPS = 16;
const MOST_AXES = 64;
/** The fewest points that an adapter has to move for a scale to be told. */
const FEWEST_MOVED = 8;
/** The most elements of all inputs together. */
const MOST_ELEMENTS = 2 ** 25;
/** The modes of files that can be run. */
const MODES = ["merged", "switch", "load", "batch"];
const FLOATS = ["float16", "float32", "float64"];
/** Larger whole numbers are not exact in JavaScript. */
const LARGEST_WHOLE = 2 ** 53;
const RANGES = new Map([
  ["bool", [0, 1]],
  ["int8", [-(2 ** 7), 2 ** 7 - 1]],
  ["uint8", [0, 2 ** 8 - 1]],
  ["int16", [-(2 ** 15), 2 ** 15 - 1]],
  ["uint16", [0, 2 ** 16 - 1]],
  ["int32", [-(2 ** 31), 2 ** 31 - 1]],
  ["uint32", [0, 2 ** 32 - 1]],
  ["int64", [-LARGEST_WHOLE, LARGEST_WHOLE]],
  ["uint64", [0, LARGEST_WHOLE]],
]);
const ARRAYS = {
  bool: Uint8Array,
  int8: Int8Array,
  uint8: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  uint64: BigUint64Array,
  float16: Uint16Array,
  float32: Float32Array,
  float64: Float64Array,
};

/** The file has no probe, a damaged one, or cannot be run here. */
export class ProbeError extends Error {}

function ensure(condition, message) {
  if (!condition) throw new ProbeError(`the probe is damaged: ${message}`);
}

/** Text as JSON has it in ASCII, so that no name changes a terminal. */
export function escaped(text) {
  const code = (sign) => sign.charCodeAt(0).toString(16).padStart(4, "0");
  return text.replace(/[^ -~]/g, (sign) => `\\u${code(sign)}`);
}

// ── where it lies ───────────────────────────────────────────────────────────

/** The text of the probe in the bytes of an .onnx file. */
export function probeText(bytes) {
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let text = null; // of two properties, runtimes take the last
  for (const [number, property] of fieldsOf(bytes)) {
    if (number !== 14) continue; // ModelProto.metadata_props
    const { 1: key, 2: value } = Object.fromEntries(fieldsOf(property));
    if (key && decoder.decode(key) === "lora_fx.probe")
      text = decoder.decode(value);
  }
  if (text === null) throw new ProbeError("the file has no probe");
  return text;
}

/** The fields of a protobuf message that have a length: number and bytes. */
function* fieldsOf(bytes) {
  let at = 0;
  const varint = () => {
    let [value, factor, byte] = [0, 1, 0];
    do {
      byte = bytes[at++] ?? 0;
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte >= 128);
    return value;
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key & 7;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = varint();
      yield [key >>> 3, bytes.subarray(at, at + length)];
      at += length;
    } else throw new ProbeError("this is no .onnx file");
  }
}

// ── the object ──────────────────────────────────────────────────────────────

/** Parse and check the text of a probe. */
export function readProbe(text) {
  const { length } = new TextEncoder().encode(text);
  if (length > MOST_BYTES)
    throw new ProbeError(
      `the probe has ${length} bytes; at most ${MOST_BYTES} are read`,
    );
  let probe;
  try {
    probe = parsed(text);
  } catch {
    throw new ProbeError("the probe is damaged: it is no JSON");
  }
  ensure(probe instanceof Map, "it is no object");
  checkProbe(probe);
  return probe;
}

/** JSON with Maps for objects. A property whose name is a number would be moved
 *  to the front of an object, so such names get a sign before them meanwhile. */
function parsed(text) {
  const marked = text.replace(/([{,]\s*)"(\d+)"(?=\s*:)/g, '$1"\\u0000$2"');
  return JSON.parse(marked, (key, value) => {
    if (!key.isWellFormed()) throw new SyntaxError("half of a surrogate pair");
    if (typeof value === "string" && !value.isWellFormed())
      throw new SyntaxError("half of a surrogate pair");
    if (value === null || typeof value !== "object" || Array.isArray(value))
      return value;
    const entries = Object.entries(value);
    return new Map(
      entries.map(([name, of]) => [name.replace(/^\0(?=\d+$)/, ""), of]),
    );
  });
}

function checkProbe(probe) {
  const version = probe.get("format");
  ensure(isWhole(version, 0, LARGEST_WHOLE), "format is no whole number");
  if (version !== 1)
    throw new ProbeError(
      `the probe has format ${version}; this program reads format 1`,
    );
  const mode = probe.get("mode");
  if (!MODES.includes(mode))
    throw new ProbeError(
      `the probe has mode ${mode}; this program reads ${MODES.join(", ")}`,
    );
  for (const key of ["inputs", "outputs", "adapters"])
    ensure(probe.get(key) instanceof Map, `${key} is no object`);
  checkInputs(probe.get("inputs"));
  checkOutputs(probe.get("outputs"));
  checkPoints(probe.get("points"), probe.get("outputs"));

  const adapters = probe.get("adapters");
  if (probe.has("base")) checkValues(probe.get("base"), probe, "base");
  if (probe.has("base_file")) checkFile(probe.get("base_file"), "base_file");
  for (const [name, adapter] of adapters) checkAdapter(name, adapter, probe);
  ensure(
    mode !== "merged" || adapters.size <= 1,
    "a merged file has one adapter at most",
  );
  ensure(probe.has("base") || adapters.size > 0, "it has no values");

  if (!probe.has("precisions")) probe.set("precisions", new Map());
  const precisions = probe.get("precisions");
  ensure(precisions instanceof Map, "precisions is no object");
  for (const [name, level] of precisions)
    ensure(isNumber(level) && level > 0, `precision ${name} is not above 0`);
}

function checkInputs(inputs) {
  let total = 0;
  for (const [name, described] of inputs) {
    ensure(described instanceof Map, `input ${name} is no object`);
    const dtype = described.get("dtype");
    if (!RANGES.has(dtype) && !FLOATS.includes(dtype))
      throw new ProbeError(
        `input ${name}: this program makes no tensors of dtype ${dtype}`,
      );
    const count = checkedSize(described.get("shape"), `input ${name}`);
    total += count;
    ensure(
      total <= MOST_ELEMENTS,
      `inputs of more than ${MOST_ELEMENTS} elements`,
    );
    const content = ["values", "fill", "drawn"].filter((key) =>
      described.has(key),
    );
    ensure(
      content.length === 1,
      `input ${name} has not one of values, fill and drawn`,
    );
    checkElements(name, described, count);
  }
}

function checkElements(name, described, count) {
  const dtype = described.get("dtype");
  if (described.has("drawn")) {
    ensure(FLOATS.includes(dtype), `input ${name} of dtype ${dtype} is drawn`);
    const isSeed = isWhole(described.get("drawn"), 0, 2 ** 32 - 1);
    ensure(isSeed, `the seed of input ${name}`);
    return;
  }
  const elements = described.has("values")
    ? described.get("values")
    : [described.get("fill")];
  const expected = described.has("values") ? count : 1;
  ensure(Array.isArray(elements), `the values of input ${name} are no list`);
  ensure(
    elements.length === expected,
    `input ${name} has ${elements.length} values`,
  );
  for (const element of elements) {
    const fits = FLOATS.includes(dtype)
      ? isNumber(element)
      : isWhole(element, ...RANGES.get(dtype));
    ensure(fits, `an element of input ${name} is no ${dtype}`);
  }
}

/** The number of elements of a shape. */
function checkedSize(shape, what) {
  ensure(
    Array.isArray(shape) && shape.length <= MOST_AXES,
    `the shape of ${what}`,
  );
  for (const size of shape)
    ensure(isWhole(size, 0, LARGEST_WHOLE), `the shape of ${what}`);
  return shape.includes(0) ? 0 : shape.reduce((a, b) => a * b, 1);
}

function checkOutputs(outputs) {
  for (const [name, described] of outputs) {
    ensure(described instanceof Map, `output ${name} is no object`);
    checkedSize(described.get("shape"), `output ${name}`);
    for (const key of ["largest", "tolerance"]) {
      const number = described.get(key);
      ensure(
        isNumber(number) && number > 0,
        `${key} of output ${name} is not above 0`,
      );
    }
    ensure(
      described.get("largest") * described.get("tolerance") > 0,
      `the tolerance of output ${name} is too small`,
    );
  }
}

function checkPoints(points, outputs) {
  ensure(
    Array.isArray(points) && points.length >= 1 && points.length <= MOST_POINTS,
    `1 to ${MOST_POINTS} points`,
  );
  for (const point of points) {
    ensure(Array.isArray(point) && point.length === 2, "a point is no pair");
    const [name, index] = point;
    ensure(outputs.has(name), "a point is in no output");
    const size = checkedSize(outputs.get(name).get("shape"), `output ${name}`);
    ensure(
      isWhole(index, 0, size - 1),
      `a point lies outside of output ${name}`,
    );
  }
}

function checkAdapter(name, adapter, probe) {
  ensure(adapter instanceof Map, `adapter ${name} is no object`);
  checkValues(adapter.get("values"), probe, `adapter ${name}`);
  for (const key of ["half", "double"])
    if (adapter.has(key))
      checkValues(adapter.get(key), probe, `${key} of adapter ${name}`);
  if (!adapter.has("groups")) adapter.set("groups", new Map());
  const groups = adapter.get("groups");
  ensure(groups instanceof Map, `the groups of adapter ${name} are no object`);
  ensure(
    groups.size <= MOST_GROUPS,
    `adapter ${name} has more than ${MOST_GROUPS} groups`,
  );
  for (const [group, values] of groups)
    checkValues(values, probe, `group ${group} of adapter ${name}`);
  const mode = probe.get("mode");
  if (mode === "batch")
    ensure(
      isWhole(adapter.get("id"), 1, LARGEST_WHOLE),
      `the id of adapter ${name}`,
    );
  if (mode === "switch" || mode === "load") {
    checkFile(adapter.get("file"), `the file of adapter ${name}`);
  }
}

function checkFile(name, what) {
  ensure(typeof name === "string" && !["", ".", ".."].includes(name), what);
  ensure(!/[/\\:\0]/.test(name), `${what} does not lie beside the model`);
}

function checkValues(values, probe, what) {
  const points = probe.get("points").length;
  ensure(
    Array.isArray(values) && values.length === points,
    `${what}: not ${points} values`,
  );
  ensure(values.every(isNumber), `${what}: a value is no number`);
}

const isNumber = (value) => Number.isFinite(value);

const isWhole = (value, low, high) =>
  Number.isInteger(value) && low <= value && value <= high;

// ── the inputs and the outputs ──────────────────────────────────────────────

/** The inputs of the probe by name, as tensors of onnxruntime-web or -node. */
export function inputsOf(ort, probe) {
  const inputs = {};
  for (const [name, described] of probe.get("inputs"))
    inputs[name] = inputOf(ort, described);
  return inputs;
}

function inputOf(ort, described) {
  const [dtype, shape] = [described.get("dtype"), described.get("shape")];
  const data = new ARRAYS[dtype](shape.reduce((a, b) => a * b, 1));
  const element = elementOf(dtype);
  if (described.has("fill")) data.fill(element(described.get("fill")));
  else if (described.has("values"))
    described.get("values").forEach((value, i) => (data[i] = element(value)));
  else {
    const seed = described.get("drawn");
    for (let i = 0; i < data.length; i++) data[i] = element(drawn(i, seed));
  }
  return new ort.Tensor(dtype, data, shape);
}

/** What turns a number into an element of an array of a dtype. */
function elementOf(dtype) {
  if (dtype === "int64" || dtype === "uint64") return BigInt;
  if (dtype === "float16") return halfBits;
  return (number) => number;
}

/** Element i of a seed. */
export function drawn(i, seed) {
  let x = Math.imul(i + 1, 0x9e3779b1) + Math.imul(seed, 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
  x ^= x >>> 16;
  return ((x >>> 20) - 2048) / 1024;
}

/** The 16 bits of the nearest float16; of two, that with an even last bit. */
export function halfBits(number) {
  const sign = number < 0 || Object.is(number, -0) ? 0x8000 : 0;
  const size = Math.abs(number);
  if (size >= 65520) return sign | 0x7c00;
  const exponent = Math.max(Math.floor(Math.log2(size)), -14);
  const steps = size / 2 ** (exponent - 10);
  let whole = Math.round(steps); // 0.5 goes up
  if (whole - steps === 0.5 && whole % 2) whole--;
  return sign | (((exponent + 14) << 10) + whole);
}

/** The number that the 16 bits of a float16 are. */
export function halfNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const rest = bits & 1023;
  if (exponent === 31) return rest ? NaN : sign * Infinity;
  if (exponent === 0) return sign * rest * 2 ** -24;
  return sign * (1024 + rest) * 2 ** (exponent - 25);
}

/** The names of the outputs that have a point. */
export function outputNames(probe) {
  return [...new Set(probe.get("points").map(([name]) => name))];
}

/** The numbers at the points, of outputs {dims, type, data} by name. */
export function atPoints(probe, outputs) {
  for (const name of outputNames(probe)) {
    const [dims, shape] = [
      outputs[name].dims,
      probe.get("outputs").get(name).get("shape"),
    ];
    if (`${dims}` !== `${shape}`)
      throw new ProbeError(
        `output ${name} is [${dims}], in the probe [${shape}]`,
      );
  }
  return probe.get("points").map(([name, index]) => {
    const { type, data } = outputs[name];
    const isBits = type === "float16" && data instanceof Uint16Array;
    return isBits ? halfNumber(data[index]) : Number(data[index]);
  });
}

/** The inputs of a file of mode batch beside the probe's: one id for every row,
 *  and the scale 1. `inputMetadata` is that of the session. */
export function idInputs(ort, probe, inputMetadata, id) {
  const shapes = new Map(inputMetadata.map(({ name, shape }) => [name, shape]));
  const [batch] = shapes.get("adapter_ids");
  const [, input] = [...probe.get("inputs")].find(
    ([name]) => shapes.get(name)?.[0] === batch,
  );
  const [rows] = input.get("shape");
  const ids = new BigInt64Array(rows).fill(BigInt(id));
  const inputs = { adapter_ids: new ort.Tensor("int64", ids, [rows]) };
  if (shapes.has("adapter_scales")) {
    const scales = new Float32Array(rows).fill(1);
    inputs.adapter_scales = new ort.Tensor("float32", scales, [rows]);
  }
  return inputs;
}

/** The first number that is no id of an adapter. */
export function idBeyond(probe) {
  const ids = [...probe.get("adapters").values()].map((of) => of.get("id"));
  return Math.max(0, ...ids) + 1;
}

// ── the verdict ─────────────────────────────────────────────────────────────

/** The verdicts that hold for an adapter whatever the base is. */
const NO_CAUSE = ["too small to tell", "not finite"];

/** How lists of numbers at the points are compared. */
class Gauge {
  constructor(probe) {
    const outputs = probe
      .get("points")
      .map(([name]) => probe.get("outputs").get(name));
    this.largest = outputs.map((output) => output.get("largest"));
    this.tolerances = outputs.map((output) => output.get("tolerance"));
    this.precisions = [...probe.get("precisions")].sort((a, b) => a[1] - b[1]);
    const every = [...probe.get("outputs").values()];
    this.largestTolerance = Math.max(...every.map((of) => of.get("tolerance")));
  }

  distance(one, other) {
    const ratio = (number, i) => Math.abs(number - other[i]) / this.largest[i];
    return Math.max(...one.map(ratio));
  }

  /** How many points lie apart by more than their tolerance. */
  moved(one, other) {
    const allowed = (i) => this.largest[i] * this.tolerances[i];
    return one.filter((number, i) => Math.abs(number - other[i]) > allowed(i))
      .length;
  }

  excess(one, other) {
    const allowed = (i) => this.largest[i] * this.tolerances[i];
    const ratio = (number, i) => Math.abs(number - other[i]) / allowed(i);
    return Math.max(...one.map(ratio));
  }
}

/**
 * The verdicts on the base, on each adapter, and in mode batch on the ids.
 *
 * `runs` has the numbers at the points: `base` (null where it was not run),
 * `adapters` (a Map by name), and in mode batch `beyondIds`, those for an id
 * that no adapter has (null where the runtime refused it).
 */
export function verdicts(probe, runs) {
  const result = {};
  let baseIsRight = true;
  if (runs.base && probe.has("base")) {
    const causes = [];
    for (const [name, adapter] of probe.get("adapters"))
      causes.push([`adapter ${name}`, adapter.get("values")]);
    result.base = verdict(
      runs.base,
      probe.get("base"),
      causes,
      new Gauge(probe),
    );
    baseIsRight = isRight(result.base, true);
  }
  if (probe.get("mode") === "batch") {
    const isChecked = runs.beyondIds?.every(Number.isNaN) ?? true;
    result.ids = isChecked ? "right" : "ids are not checked";
  }

  const adapters = [];
  for (const [name, found] of runs.adapters) {
    let answer = verdictOnAdapter(found, name, probe);
    const namesNoCause = isRight(answer, true) || NO_CAUSE.includes(answer);
    if (!baseIsRight && !namesNoCause) answer = "differs";
    adapters.push([name, answer]);
  }
  result.adapters = Object.fromEntries(adapters);
  return result;
}

/** Whether a verdict is `right`, in any precision if that is enough. */
export function isRight(answer, anyPrecision) {
  return answer === "right" || (anyPrecision && answer.startsWith("right in "));
}

function verdictOnAdapter(found, name, probe) {
  const adapter = probe.get("adapters").get(name);
  const [expected, base] = [adapter.get("values"), probe.get("base")];
  const causes = [];
  if (base) causes.push(["no effect", base]);
  for (const [other, fields] of probe.get("adapters"))
    if (other !== name) causes.push([`adapter ${other}`, fields.get("values")]);
  for (const [group, values] of adapter.get("groups"))
    causes.push([`without ${group}`, values]);
  const [half, double] = [adapter.get("half"), adapter.get("double")];
  if (half) causes.push(["scaled by 0.5", half]);
  if (double) causes.push(["scaled by 2", double]);

  const gauge = new Gauge(probe);
  const effect = base ? gauge.distance(expected, base) : Infinity;
  const nearOne = base ? scaleNearOne(found, base, expected, gauge) : null;
  const answer = verdict(found, expected, causes, gauge, effect, nearOne);
  if (answer === "right" && effect <= 2 * gauge.largestTolerance)
    return "too small to tell";
  if (answer === "differs" && base && half && double) {
    const scale = fittedScale(found, base, half, expected, double, gauge);
    return scale === null ? "differs" : `scaled by ${scale}`;
  }
  return answer;
}

/** The verdict by rules 1 to 5, and `differs` where these have none. A
 *  precision is not told unless the effect is above four times its level. */
function verdict(
  found,
  expected,
  causes,
  gauge,
  effect = Infinity,
  nearOne = null,
) {
  if (!found.every(Number.isFinite)) return "not finite";
  if (gauge.excess(found, expected) <= 1) return "right";
  const named = (matches) =>
    causes
      .filter(([, values]) => matches(values))
      .map(([name]) => name)
      .join(" or ");
  const names = named((values) => gauge.excess(found, values) <= 1);
  if (names) return names;
  if (nearOne !== null) return `scaled by ${nearOne}`;
  for (const [precision, level] of gauge.precisions) {
    if (effect <= 4 * level) continue;
    if (gauge.distance(found, expected) <= level)
      return `right in ${precision}`;
    const near = named((values) => gauge.distance(found, values) <= level);
    if (near) return `${near} in ${precision}`;
  }
  return "differs";
}

/** The scale within 0.1 of 1 that explains the numbers, by rule 4, or null. */
function scaleNearOne(found, base, values, gauge) {
  if (gauge.moved(values, base) < FEWEST_MOVED) return null;
  if (!found.every(Number.isFinite)) return null;
  const effect = values.map(
    (number, i) => (number - base[i]) / gauge.largest[i],
  );
  const difference = found.map(
    (number, i) => (number - values[i]) / gauge.largest[i],
  );
  const dot = (one, other) =>
    one.reduce((sum, number, i) => sum + number * other[i], 0);
  const share = dot(difference, effect) / dot(effect, effect);
  if (!(Math.abs(share) <= 0.1)) return null;
  const left = difference.map((number, i) =>
    Math.abs(number - share * effect[i]),
  );
  const explains =
    Math.max(...left) <= Math.max(...difference.map(Math.abs)) / 8;
  const scale = Math.floor(100 * (1 + share) + 0.5) / 100;
  return explains && scale !== 1 ? scale : null;
}

/** The scale of the adapter that explains the numbers, by rule 6, or null. It
 *  is counted in hundredths, as 0.9 and 1.1 have no exact distance of 0.1 to 1. */
function fittedScale(found, base, half, values, double, gauge) {
  if (gauge.moved(values, base) < FEWEST_MOVED) return null;
  let [nearest, least] = [0, Infinity];
  for (let hundredths = 10; hundredths <= 300; hundredths++) {
    const s = hundredths / 100;
    const cubic = base.map(
      (_, i) =>
        -(s - 0.5) * (s - 1) * (s - 2) * base[i] +
        ((s * (s - 1) * (s - 2)) / 0.375) * half[i] -
        2 * s * (s - 0.5) * (s - 2) * values[i] +
        ((s * (s - 0.5) * (s - 1)) / 3) * double[i],
    );
    const distance = gauge.distance(found, cubic);
    if (distance < least) [nearest, least] = [hundredths, distance];
  }
  const explains = least <= 0.02 * gauge.distance(values, base);
  const isBetter = least <= gauge.distance(found, values) / 8;
  const isOtherScale = nearest > 0 && Math.abs(nearest - 100) > 10;
  return explains && isBetter && isOtherScale ? nearest / 100 : null;
}
