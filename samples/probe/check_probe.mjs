// Check an .onnx file of lora-fx against the probe that it carries:
//
//   npm install onnxruntime-web@1.30.0
//   node check_probe.mjs model.onnx
//
// This needs neither lora-fx nor the model that the file was made from.
// docs/probe.md has the format and the rules of the verdict. Files of mode
// merged and batch are checked, and portable ones of mode switch with the
// adapters beside them. Printed is one JSON object, such as
//
//   {"base":"right","adapters":{"de":"right","fr":"no effect"}}
//
// The exit code is 0 if all are right, or too small to tell; 1 if one is not;
// and 2 with one line on stderr if the file has no probe, a damaged one, or
// cannot be run. With --any-precision, "right in bfloat16" is right too.

import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import * as ort from "onnxruntime-web";
import { readSafetensors } from "../runtimes/switch.mjs";
import {
  atPoints,
  escaped,
  idBeyond,
  idInputs,
  inputsOf,
  isRight,
  outputNames,
  ProbeError,
  probeText,
  readProbe,
  verdicts,
} from "./probe.mjs";

/** Raise for adapters that onnxruntime-web cannot run. */
function checkRunnable(probe) {
  const adapters = probe.get("adapters");
  if (probe.get("mode") === "load" && adapters.size)
    throw new ProbeError(
      "mode load: onnxruntime-web cannot replace initializers, which hold the adapter",
    );
  if (probe.get("mode") === "switch" && adapters.size)
    if (!probe.has("base_file"))
      throw new ProbeError(
        "mode switch: onnxruntime-web takes no other value for an input with a default; " +
          "export with --target portable",
      );
}

/** Open a file, with its data where that lies in a file beside it. */
async function opened(path, bytes) {
  const externalData = [];
  if (existsSync(`${path}.data`)) {
    const data = await readFile(`${path}.data`);
    externalData.push({ path: `${basename(path)}.data`, data });
  }
  const options = { logSeverityLevel: 4, externalData };
  return ort.InferenceSession.create(bytes, options);
}

/** A and B of a .safetensors file, as tensors by name. */
async function factorsIn(file) {
  const { buffer } = Uint8Array.from(await readFile(file));
  const tensors = {};
  for (const [name, { dims, data }] of Object.entries(readSafetensors(buffer)))
    tensors[name] = new ort.Tensor("float32", data, dims);
  return tensors;
}

/** The verdicts on a file. */
async function check(path) {
  const bytes = await readFile(path);
  const probe = readProbe(probeText(bytes));
  checkRunnable(probe);
  const session = await opened(path, bytes);
  const [inputs, names] = [inputsOf(ort, probe), outputNames(probe)];
  const run = async (tensors) => {
    const options = { logSeverityLevel: 4 }; // a run that fails is no news here
    const feeds = { ...inputs, ...tensors };
    return atPoints(probe, await session.run(feeds, names, options));
  };

  const mode = probe.get("mode");
  const withId = (id) => run(idInputs(ort, probe, session.inputMetadata, id));
  const runBase = async () => {
    if (mode === "batch") return withId(0);
    const file = probe.get("base_file");
    return run(file ? await factorsIn(join(dirname(path), file)) : {});
  };
  const runAdapter = async (adapter) => {
    if (mode === "batch") return withId(adapter.get("id"));
    if (mode === "merged") return run({});
    return run(await factorsIn(join(dirname(path), adapter.get("file"))));
  };

  const runs = { base: null, adapters: new Map(), beyondIds: null };
  const adapters = probe.get("adapters");
  const isBaseRun = mode !== "merged" || !adapters.size;
  if (probe.has("base") && isBaseRun) runs.base = await runBase();
  for (const [name, adapter] of adapters)
    runs.adapters.set(name, await runAdapter(adapter));
  if (mode === "batch")
    runs.beyondIds = await withId(idBeyond(probe)).catch(() => null);
  return verdicts(probe, runs);
}

async function main(options) {
  const anyPrecision = options.includes("--any-precision");
  const paths = options.filter((option) => option !== "--any-precision");
  if (paths.length !== 1) {
    console.error("Error: node check_probe.mjs [--any-precision] MODEL.onnx");
    return 2;
  }
  let result;
  try {
    result = await check(paths[0]);
  } catch (error) {
    const message = escaped(String(error.message ?? error));
    console.error(`Error: ${message.slice(0, 400)}`);
    return 2;
  }
  console.log(escaped(JSON.stringify(result)));
  const { base = "right", ids = "right", adapters } = result;
  const answers = [base, ids, ...Object.values(adapters)];
  const isFine = (answer) =>
    answer === "too small to tell" || isRight(answer, anyPrecision);
  return answers.every(isFine) ? 0 : 1;
}

process.exit(await main(process.argv.slice(2)));
