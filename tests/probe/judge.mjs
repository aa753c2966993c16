// The verdicts of samples/probe/probe.mjs on many cases: `node judge.mjs CASES`.
// readers.py says what a case and an answer are.

import { readFile } from "node:fs/promises";
import { readProbe, verdicts } from "../../samples/probe/probe.mjs";

const outputs = (list) => list?.map((number) => number ?? NaN) ?? null;

function judged({ text, runs }) {
  try {
    const probe = readProbe(text);
    const adapters = runs.adapters.map(([name, of]) => [name, outputs(of)]);
    const result = verdicts(probe, {
      base: outputs(runs.base),
      adapters: new Map(adapters),
      beyondIds: outputs(runs.beyond_ids),
    });
    return { result };
  } catch (error) {
    if (error.constructor.name !== "ProbeError") throw error;
    return { error: error.message };
  }
}

const cases = JSON.parse(await readFile(process.argv[2]));
process.stdout.write(JSON.stringify(cases.map(judged)));
