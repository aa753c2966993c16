// Run the cases of a job with onnxruntime-web. In node: `node web_runner.mjs JOB.json`, which
// prints the results; in a page, `runJob` is imported. A job and its results are described in
// web.py, and the files of a job are read by `read`, which gives an ArrayBuffer.

const REPEATED = 100; // a browser's clock is coarse
const COPIES = 16; // adapters that are read to see what one takes

const base64 = bytes => {
  let text = '';
  for (let i = 0; i < bytes.length; i += 8192)
    text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
};

const stored = ({type, dims, data}) => ({
  type, dims, data: base64(new Uint8Array(data.buffer, data.byteOffset, data.byteLength)),
});

/** The results of every case, in order; or the error of making the session. */
export async function runJob(ort, sample, read, job) {
  const results = {error: null, cases: [], figures: {}};
  const webgpu = {name: 'webgpu', ...(job.cpu.length && {forceCpuNodeNames: job.cpu})};
  let session;
  try {
    session = await ort.InferenceSession.create(new Uint8Array(await read(job.model)), {
      executionProviders: [job.provider === 'webgpu' ? webgpu : 'wasm'], logSeverityLevel: 3,
    });
  } catch (error) {
    return {...results, error: String(error.message ?? error)};
  }

  const none = sample.noAdapter(session);
  const adapters = {base: none};
  for (const [name, file] of Object.entries(job.adapters))
    adapters[name] = {...none, ...sample.readSafetensors(await read(file))};
  for (const {adapter, feeds} of job.cases) {
    try {
      const outputs = await sample.run(ort, session, feeds, adapters[adapter]);
      const entries = Object.entries(outputs).map(([name, value]) => [name, stored(value)]);
      results.cases.push({error: null, outputs: Object.fromEntries(entries)});
    } catch (error) {
      results.cases.push({error: String(error.message ?? error), outputs: {}});
    }
  }
  if (job.rounds) results.figures = await figures(ort, sample, session, job, adapters);
  await session.release();
  return results;
}

const median = numbers => numbers.sort((x, y) => x - y)[Math.floor(numbers.length / 2)];

/** Microseconds, medians of interleaved rounds: runs that keep the adapter and that change it. */
async function figures(ort, sample, session, {rounds, cases: [{feeds}]}, {a, b}) {
  const times = {run: [], run_after_swap: [], swap: [], copy: []};
  const timed = async (what, work) => {
    const start = performance.now();
    await work();
    times[what].push(1000 * (performance.now() - start));
  };
  const repeated = (what, work) => {
    const start = performance.now();
    for (let i = 0; i < REPEATED; i++) work();
    times[what].push(1000 * (performance.now() - start) / REPEATED);
  };
  const run = adapter => sample.run(ort, session, feeds, adapter);
  const copies = Object.values(b).map(({data}) => data.slice());
  const copy = () => Object.values(b).forEach(({data}, i) => copies[i].set(data));
  const swap = () => Object.values(b).map(({dims, data}) => new ort.Tensor('float32', data, dims));
  await run(b);
  for (let i = 0; i < rounds; i++) {
    await run(a);
    await timed('run_after_swap', () => run(b));
    await timed('run', () => run(b));
    repeated('swap', swap);
    repeated('copy', copy);
  }
  return Object.fromEntries(Object.entries(times).map(([what, list]) => [`${what}_us`, median(list)]));
}

/** Bytes of this process for every further adapter that is read and run. */
async function memory(ort, sample, read, job) {
  const session = await ort.InferenceSession.create(new Uint8Array(await read(job.model)));
  const none = sample.noAdapter(session), {feeds} = job.cases[0], kept = [];
  const more = async () => {
    kept.push(sample.readSafetensors(await read(job.adapters.b)));
    await sample.run(ort, session, feeds, {...none, ...kept.at(-1)});
    globalThis.gc();
    const {arrayBuffers} = process.memoryUsage();
    return arrayBuffers;
  };
  await more(); // the first run enlarges the runtime's own memory
  const before = await more();
  for (let i = 0; i < COPIES - 1; i++) await more();
  return (await more() - before) / COPIES;
}

if (typeof process !== 'undefined' && import.meta.filename === process.argv[1]) {
  const {readFile} = await import('node:fs/promises');
  const samples = '../../samples/';
  const ort = await import(`${samples}node_modules/onnxruntime-web/dist/ort.node.min.mjs`);
  const sample = await import(`${samples}runtimes/switch.mjs`);
  const read = async path => Uint8Array.from(await readFile(path)).buffer;
  const job = JSON.parse(await readFile(process.argv[2]));
  const results = await runJob(ort, sample, read, job);
  if (job.rounds) results.figures.second_adapter_bytes = await memory(ort, sample, read, job);
  process.stdout.write(JSON.stringify(results));
}
