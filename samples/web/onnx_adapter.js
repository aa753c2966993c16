// ONNX Runtime's adapter files: a flatbuffer of named tensors, of which this page needs float32.
//
//   Adapter    format_version, adapter_version, model_version: int32; parameters: [Parameter]
//   Parameter  name: string; dims: [int64]; data_type: int32, ONNX's number; raw_data: [uint8]
//
// Source: onnxruntime/lora/adapter_format/adapter_schema.fbs. An offset in a flatbuffer counts from
// its own position. A table begins with the distance back to the list of its fields' positions.

const FLOAT = 1, FORMAT = 1;

/** The adapter_version of files with A and B as the inputs of a graph have them: "LFX1". */
export const SERVED = 0x4C465831;

/** The tensors of a file, {dims, data} by name. Throws where it is no such file. */
export function read(buffer) {
  const view = new DataView(buffer);
  const mark = buffer.byteLength < 8 ? '' : String.fromCharCode(...new Uint8Array(buffer, 4, 4));
  if (mark !== 'TORT') throw new Error('this is no adapter of ONNX Runtime');
  const follow = at => at + view.getUint32(at, true);
  const field = (table, index) => {
    const fields = table - view.getInt32(table, true);
    return table + view.getUint16(fields + 4 + 2 * index, true);
  };
  const vector = (table, index) => {
    const at = follow(field(table, index));
    return [at + 4, view.getUint32(at, true)];
  };
  const tensors = {};
  const [first, count] = vector(follow(0), 3);
  for (let i = 0; i < count; i++) {
    const table = follow(first + 4 * i);
    const name = new TextDecoder().decode(new Uint8Array(buffer, ...vector(table, 0)));
    const kind = view.getInt32(field(table, 2), true);
    if (kind !== FLOAT) throw new Error(`${name}: dtype ${kind} of ONNX; expected float32 (1)`);
    const [from, rank] = vector(table, 1);
    const dims = Array.from({length: rank}, (_, d) => Number(view.getBigInt64(from + 8 * d, true)));
    const [start, bytes] = vector(table, 3);
    tensors[name] = {dims, data: new Float32Array(buffer.slice(start, start + bytes))};
  }
  return tensors;
}

/** A file of tensors, {dims, data} by name, data of float32. */
export function write(tensors, version = 1) {
  const entries = Object.entries(tensors).map(
    ([name, {dims, data}]) => ({name: new TextEncoder().encode(name), dims, data}));
  // 80 bytes are more than a table, its place in the list, three lengths and what aligns them take
  const size = entries.reduce(
    (sum, e) => sum + 80 + e.name.length + 8 * e.dims.length + e.data.byteLength, 96);
  const view = new DataView(new ArrayBuffer(size)), bytes = new Uint8Array(view.buffer);
  let at = 0;
  const int = value => { view.setInt32(at, value, true); at += 4; };
  const short = value => { view.setUint16(at, value, true); at += 2; };
  // the next thing is what `place` refers to; what follows a length of 4 bytes is aligned
  const refer = (place, align = 4, length = 4) => {
    while ((at + length) % align) at++;
    view.setUint32(place, at - place, true);
  };
  const table = fields => { int(at - fields); at += 16; return at - 16; };

  at = 4;
  bytes.set(new TextEncoder().encode('TORT'), at);
  at = 8;
  const fields = at;
  [12, 20, 4, 8, 12, 16].forEach(short); // both kinds of table have four fields of 4 bytes
  refer(0, 4, 0);
  const root = table(fields);
  [FORMAT, version, 1].forEach((value, i) => view.setInt32(root + 4 * i, value, true));
  refer(root + 12);
  int(entries.length);
  const list = at;
  at += 4 * entries.length;
  entries.forEach(({name, dims, data}, i) => {
    refer(list + 4 * i, 4, 0);
    const own = table(fields);
    view.setInt32(own + 8, FLOAT, true);
    refer(own);
    int(name.length);
    bytes.set(name, at);
    at += name.length + 1; // strings end with a zero
    refer(own + 4, 8);
    int(dims.length);
    for (const size of dims) { view.setBigInt64(at, BigInt(size), true); at += 8; }
    refer(own + 12, 8);
    int(data.byteLength);
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  });
  return view.buffer.slice(0, at);
}
