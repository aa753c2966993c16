// Run a switch file without an adapter, with each adapter, and without one again, in one session:
//
//   npm install onnxruntime-web@1.30.0
//   node web_switch.mjs model.onnx feeds.json first.safetensors second.safetensors
//
// feeds.json is {"input_ids": {"type": "int64", "dims": [1, 3], "data": [5, 17, 29]}}.

import {readFile} from 'node:fs/promises';
import {basename} from 'node:path';
import * as ort from 'onnxruntime-web';
import {noAdapter, readSafetensors, run, shown} from './switch.mjs';

// Without this, node prints a page of the package's source before an error's message.
process.on('uncaughtException', error => {
  console.error(`Error: ${error.message ?? error}`);
  process.exit(1);
});

const [model, feeds, ...files] = process.argv.slice(2);
const session = await ort.InferenceSession.create(await readFile(model));
const inputs = JSON.parse(await readFile(feeds));

const none = noAdapter(session);
const adapters = {base: none};
for (const file of files) {
  const {buffer} = Uint8Array.from(await readFile(file));
  adapters[basename(file, '.safetensors')] = {...none, ...readSafetensors(buffer)};
}
for (const name of [...Object.keys(adapters), 'base']) {
  const outputs = await run(ort, session, inputs, adapters[name]);
  for (const line of shown(outputs)) console.log(`${name}: ${line}`);
}
