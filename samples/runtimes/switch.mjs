// What a switch file needs in JavaScript: its adapters, read from safetensors, and the base's.

/** The float32 tensors of a safetensors file, {dims, data} by name; data are views of the buffer. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, {dtype, shape, data_offsets: [from, to]}] of Object.entries(header)) {
    if (dtype !== 'F32') throw new Error(`${name}: dtype ${dtype}; expected F32`);
    const start = 8 + length + from;
    tensors[name] = {dims: shape, data: start % 4
      ? new Float32Array(buffer.slice(start, start + to - from)) // a view must be aligned
      : new Float32Array(buffer, start, (to - from) / 4)};
  }
  return tensors;
}

/** A and B that change nothing: one rank of zeros for every target of the file. */
export function noAdapter(session) {
  const tensors = {};
  for (const {name, shape} of session.inputMetadata)
    if (/\.lora_[AB]$/.test(name)) {
      const dims = shape.map(size => typeof size === 'number' ? size : 1);
      tensors[name] = {dims, data: new Float32Array(dims.reduce((a, b) => a * b, 1))};
    }
  return tensors;
}

const ARRAYS = {
  float32: Float32Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array,
};

/** An ort.Tensor of numbers as JSON has them: {type, dims, data}. */
export function tensor(ort, {type = 'float32', dims, data}) {
  const numbers = type === 'int64' ? Array.from(data, BigInt) : data;
  return new ort.Tensor(type, ARRAYS[type].from(numbers), dims);
}

/** Run the file with an adapter. The next adapter is another argument: nothing is loaded again. */
export function run(ort, session, feeds, adapter) {
  const inputs = {};
  for (const [name, value] of Object.entries(feeds)) inputs[name] = tensor(ort, value);
  for (const [name, {dims, data}] of Object.entries(adapter))
    inputs[name] = new ort.Tensor('float32', data, dims);
  return session.run(inputs);
}

/** The first numbers of every output, to look at. */
export function shown(outputs) {
  return Object.entries(outputs).map(([name, {dims, data}]) =>
    `${name} [${dims}] ${Array.from(data.slice(0, 4), x => Number(x).toPrecision(6)).join(' ')} …`);
}
