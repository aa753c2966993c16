// Run the cases of a job with onnxruntime-web. In node: `node web_runner.mjs JOB.json`, which
// prints the results; in a page, `runJob` is imported. A job and its results are described in
// web.py, and the files of a job are read by `read`, which gives an ArrayBuffer.

const MEASURED = 20;

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
  if (job.measure) results.figures = await figures(ort, sample, session, job.cases[0].feeds, adapters);
  await session.release();
  return results;
}

const median = numbers => numbers.sort((x, y) => x - y)[Math.floor(numbers.length / 2)];

/** Milliseconds of runs that keep the adapter and of runs that change it, and of a copy of B. */
async function figures(ort, sample, session, feeds, {a, b}) {
  const kept = [], changed = [], copied = [];
  const timed = async (list, work) => {
    const start = performance.now();
    await work();
    list.push(performance.now() - start);
  };
  const copy = () => { for (const {data} of Object.values(b)) data.slice(); };
  await sample.run(ort, session, feeds, a);
  await sample.run(ort, session, feeds, b);
  for (let i = 0; i < MEASURED; i++) {
    await timed(kept, () => sample.run(ort, session, feeds, b));
    await sample.run(ort, session, feeds, a);
    await timed(changed, () => sample.run(ort, session, feeds, b));
    await timed(copied, copy);
  }
  const bytes = Object.values(b).reduce((sum, {data}) => sum + data.byteLength, 0);
  return {
    run_ms: median(kept), run_after_swap_ms: median(changed), copy_ms: median(copied),
    adapter_bytes: bytes,
  };
}

/** Bytes that the process holds in buffers more after a second adapter was read and run. */
async function memory(ort, sample, read, job) {
  const session = await ort.InferenceSession.create(new Uint8Array(await read(job.model)));
  const none = sample.noAdapter(session), {feeds} = job.cases[0];
  const kept = {};
  const held = async name => {
    kept[name] = sample.readSafetensors(await read(job.adapters[name]));
    await sample.run(ort, session, feeds, {...none, ...kept[name]});
    globalThis.gc();
    return process.memoryUsage().arrayBuffers;
  };
  // A run's copies in the runtime's own memory are given back, and that memory is one buffer.
  await held('a');
  const before = await held('a');
  return await held('b') - before;
}

if (typeof process !== 'undefined' && import.meta.filename === process.argv[1]) {
  const {readFile} = await import('node:fs/promises');
  const samples = '../../samples/';
  const ort = await import(`${samples}node_modules/onnxruntime-web/dist/ort.node.min.mjs`);
  const sample = await import(`${samples}runtimes/switch.mjs`);
  const read = async path => Uint8Array.from(await readFile(path)).buffer;
  const job = JSON.parse(await readFile(process.argv[2]));
  const results = await runJob(ort, sample, read, job);
  if (job.measure) results.figures.memory_bytes = await memory(ort, sample, read, job);
  process.stdout.write(JSON.stringify(results));
}
