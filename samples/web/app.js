// The page: drawing, the training loop, the display and the downloads.
//
// `step.onnx` takes a batch, `labels`, `lr`, `step`, A and B of every target, and the optimizer's
// two states of each; it returns `loss`, and the new values as NAME.next. `forward.onnx` is the
// network with A and B as inputs. `step.onnx_adapter` has their initial values. Its B is zero,
// which is the network without an adapter.
//
// The network runs on WebGPU where the browser has it. The step always runs on WebAssembly: it
// computes AdamW's corrections in float64, for which the runtime with WebGPU has no kernels.

import * as ort from './ort.wasm.min.mjs';
import {SERVED, read, write} from './onnx_adapter.js';
import {atPoints, inputsOf, outputNames, probeText, readProbe, verdicts} from './probe.mjs';

const SIDE = 8, PIXELS = SIDE * SIDE, DIGITS = 10;
const RATE = 0.01;
const MOVES = [[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]];
const names = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C'];
const $ = id => document.getElementById(id);
const floats = (data, dims) => new ort.Tensor('float32', data, dims);
const integers = (data, dims) => new ort.Tensor('int64', BigInt64Array.from(data, BigInt), dims);

/** All that changes. Adapters are {dims, data} by name; `yours` is null until it is trained. */
export const state = {strokes: [], examples: [], base: null, yours: null, losses: [], busy: true};
let step, forward, shown, held, shows = 0;
/** The pen that the keys move, in dots of the canvas. */
const pen = {x: 128, y: 128, isDown: false};

// ── the network ────────────────────────────────────────────────────────────────────────────────

async function fetched(name) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer;
}

const bytes = async name => new Uint8Array(await (await fetched(name)).arrayBuffer());

/** A session of one of the two builds of the runtime. */
function session(runtime, model, options) {
  runtime.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  runtime.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
  return runtime.InferenceSession.create(model, options);
}

/** The network on WebGPU where that is possible, else on WebAssembly; and what the page says. */
async function opened(model) {
  let reason = 'This browser has no WebGPU';
  try {
    if (await navigator.gpu?.requestAdapter()) {
      const options = {executionProviders: ['webgpu']};
      return [await session(await import('./ort.webgpu.min.mjs'), model, options),
        'Ready. The network runs on WebGPU, and its training on WebAssembly.'];
    }
  } catch (error) {
    reason = `WebGPU cannot be used here (${error.message ?? error})`;
  }
  return [await session(ort, model), `Ready. ${reason}: all runs on WebAssembly.`];
}

async function load() {
  const externalData = [{path: 'step.onnx.data', data: await bytes('step.onnx.data')}];
  step = await session(ort, await bytes('step.onnx'), {externalData});
  const file = await bytes('forward.onnx');
  const [network, where] = await opened(file);
  forward = network;
  state.base = read(await (await fetched('step.onnx_adapter')).arrayBuffer());
  $('proof').textContent = await proof(file);
  const digits = await (await fetched('digits.json')).json();
  const parts = ({pixels, labels}) => labels.map((label, i) => (
    {label, pixels: Float32Array.from(pixels.slice(PIXELS * i, PIXELS * (i + 1)), v => v / 16)}));
  [shown, held] = [parts(digits.shown), parts(digits.held)];
  return where;
}

const PROOFS = {
  'right': 'The network computes here what it did when its file was written.',
  'right in tf32': 'The network computes here what it did when its file was written, in TF32.',
  'right in bfloat16':
    'The network computes here what it did when its file was written, in bfloat16.',
  'not finite': 'The network computes here what is not finite: do not trust what it reads.',
  'differs':
    'The network does not compute here what it did when its file was written: do not trust what ' +
    'it reads.',
};

/** What the probe in the network's file says: is the network what it was, here? */
async function proof(file) {
  try {
    const probe = readProbe(probeText(file)), names = outputNames(probe);
    const feeds = {...inputsOf(ort, probe), ...tensors(state.base)};
    const base = atPoints(probe, await inTurn(() => forward.run(feeds, names)));
    return PROOFS[verdicts(probe, {base, adapters: new Map()}).base];
  } catch (error) {
    return `The network cannot be checked here: ${error.message ?? error}`;
  }
}

/** Work in its turn: a session on WebGPU takes no second run before the first one is done. */
let last = Promise.resolve();
const inTurn = work => last = last.then(work, work);

const tensors = adapter => Object.fromEntries(
  Object.entries(adapter).map(([name, {dims, data}]) => [name, floats(data, dims)]));

function images(list) {
  const data = new Float32Array(PIXELS * list.length);
  list.forEach((pixels, i) => data.set(pixels, PIXELS * i));
  return floats(data, [list.length, 1, SIDE, SIDE]);
}

/** Chances of every class, a row an image. */
export async function predict(list, adapter) {
  if (!list.length) return [];
  const {output} = await inTurn(() => forward.run({input: images(list), ...tensors(adapter)}));
  return list.map((_, i) => {
    const scores = output.data.subarray(names.length * i, names.length * (i + 1));
    const most = Math.max(...scores), powers = Array.from(scores, s => Math.exp(s - most));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map(p => p / sum);
  });
}

const best = chances => chances.indexOf(Math.max(...chances));

function moved(pixels, [down, right]) {
  return pixels.map((_, i) => {
    const row = Math.floor(i / SIDE) - down, column = i % SIDE - right;
    const inside = row >= 0 && row < SIDE && column >= 0 && column < SIDE;
    return inside ? pixels[row * SIDE + column] : 0;
  });
}

/** What every step sees. */
export function batch() {
  const all = [...shown];
  for (const {pixels, label} of state.examples)
    for (const move of MOVES) all.push({label, pixels: moved(pixels, move)});
  return {input: images(all.map(e => e.pixels)),
    labels: integers(all.map(e => e.label), [all.length])};
}

/** The loop: a step reads A, B and the states of each, and the next one reads what it wrote. */
async function train(steps) {
  const given = batch();
  let now = tensors(state.base);
  for (const name of step.outputNames.filter(n => n !== 'loss').map(n => n.slice(0, -'.next'.length)))
    if (!(name in now)) { // one of the optimizer's states, NAME.m or NAME.v
      const {dims, data} = state.base[name.slice(0, name.lastIndexOf('.'))];
      now[name] = floats(new Float32Array(data.length), dims);
    }
  state.losses = [];
  for (let t = 1; t <= steps; t++) {
    const lr = floats([RATE], []), number = integers([t], []);
    const {loss, ...next} = await step.run({...given, lr, step: number, ...now});
    now = Object.fromEntries(
      Object.entries(next).map(([name, value]) => [name.slice(0, -'.next'.length), value]));
    state.losses.push(loss.data[0]);
    drawCurve(steps);
    await new Promise(requestAnimationFrame);
  }
  state.yours = Object.fromEntries(
    Object.keys(state.base).map(n => [n, {dims: [...now[n].dims], data: now[n].data}]));
}

// ── drawing ────────────────────────────────────────────────────────────────────────────────────

/** Strokes as the data has digits: as large as 32 × 32 allow, then the ink of 4 × 4 at a time. */
function pixelsOf(strokes) {
  const large = 32, pen = 3.5, room = large - pen - 1, points = strokes.flat();
  const [xs, ys] = [points.map(p => p[0]), points.map(p => p[1])];
  const [left, top] = [Math.min(...xs), Math.min(...ys)];
  const [width, height] = [Math.max(...xs) - left, Math.max(...ys) - top];
  const scale = room / Math.max(width, height, 20);
  const canvas = new OffscreenCanvas(large, large), pencil = canvas.getContext('2d');
  pencil.translate((large - scale * width) / 2, (large - scale * height) / 2);
  pencil.scale(scale, scale);
  pencil.translate(-left, -top);
  drawStrokes(pencil, strokes, pen / scale);
  const ink = pencil.getImageData(0, 0, large, large).data, each = large / SIDE;
  const sums = new Float32Array(PIXELS);
  for (let i = 0; i < large * large; i++)
    sums[Math.floor(i / large / each) * SIDE + Math.floor(i % large / each)] += ink[4 * i + 3];
  return sums.map(sum => Math.round(sum / 255) / each ** 2);
}

function drawStrokes(pencil, strokes, width) {
  Object.assign(pencil, {lineWidth: width, lineCap: 'round', lineJoin: 'round'});
  for (const stroke of strokes) {
    pencil.beginPath();
    stroke.forEach(([x, y]) => pencil.lineTo(x, y));
    if (stroke.length === 1) pencil.lineTo(...stroke[0]);
    pencil.stroke();
  }
}

function drawPad() {
  const pencil = $('pad').getContext('2d'), style = getComputedStyle($('pad'));
  pencil.clearRect(0, 0, $('pad').width, $('pad').height);
  pencil.strokeStyle = style.color;
  drawStrokes(pencil, state.strokes, 16);
  if ($('pad').matches(':focus-visible')) drawPen(pencil, style.getPropertyValue('--accent'));
}

/** The pen that the keys move: a disc where it is down, a ring where it is not. */
function drawPen(pencil, color) {
  pencil.beginPath();
  pencil.arc(pen.x, pen.y, 9, 0, 2 * Math.PI);
  Object.assign(pencil, {fillStyle: color, strokeStyle: color, lineWidth: 4});
  if (pen.isDown) pencil.fill();
  pencil.stroke();
}

function followPointer() {
  const place = event => {
    const box = $('pad').getBoundingClientRect();
    return [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height]
      .map(v => v * $('pad').width);
  };
  $('pad').onpointerdown = event => {
    $('pad').setPointerCapture(event.pointerId);
    state.strokes.push([place(event)]);
    changed();
  };
  $('pad').onpointermove = event => {
    if (!$('pad').hasPointerCapture(event.pointerId) || !state.strokes.length) return;
    state.strokes.at(-1).push(place(event));
    changed();
  };
}

/** The arrows move the pen by 8 of the 256 dots, and Space puts it down or lifts it. */
function followKeys() {
  const moves = {ArrowUp: [0, -8], ArrowDown: [0, 8], ArrowLeft: [-8, 0], ArrowRight: [8, 0]};
  const within = place => Math.min(Math.max(place, 8), $('pad').width - 8);
  const put = isDown => {
    pen.isDown = isDown;
    $('pen').textContent = isDown ? 'The pen is down.' : 'The pen is up.';
  };
  $('pad').onkeydown = event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === ' ') {
      put(!pen.isDown);
      if (pen.isDown) state.strokes.push([[pen.x, pen.y]]);
    } else if (event.key in moves) {
      const [right, down] = moves[event.key];
      Object.assign(pen, {x: within(pen.x + right), y: within(pen.y + down)});
      if (pen.isDown) state.strokes.at(-1).push([pen.x, pen.y]);
    } else return;
    event.preventDefault();
    changed();
  };
  $('pad').onfocus = drawPad;
  $('pad').onblur = () => {
    pen.isDown = false;
    $('pen').textContent = '';
    drawPad();
  };
}

// ── what is shown ──────────────────────────────────────────────────────────────────────────────

function element(tag, content = '', className = '') {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...[content].flat());
  return made;
}

const percent = chance => `${(100 * chance).toFixed(chance < 0.9995 && chance > 0.99 ? 1 : 0)} %`;
const chosen = () => Number(document.querySelector('#classes :checked').value);
const active = () => document.querySelector('#adapters :checked').value;

async function showReading() {
  const strokes = state.strokes;
  const [chances] = strokes.length
    ? await predict([pixelsOf(strokes)], state[active()]) : [names.map(() => 0)];
  if (strokes !== state.strokes) return; // cleared in the meantime
  const order = names.map((_, i) => i).sort((a, b) => chances[b] - chances[a]).slice(0, 3);
  $('reading').replaceChildren(...order.map(i => {
    const row = element('div', [element('span', strokes.length ? names[i] : '–'),
      element('span', strokes.length ? percent(chances[i]) : '')], 'row');
    const bar = element('div', element('i'), 'bar');
    bar.firstChild.style.width = `${100 * chances[i]}%`;
    return element('li', [row, bar]);
  }));
}

function showExample(example, i, before, after) {
  const small = element('canvas');
  small.width = small.height = SIDE;
  small.role = 'img';
  small.ariaLabel = `Example ${i + 1}`;
  const item = element('li', small), pencil = small.getContext('2d');
  const said = (when, chances) => {
    const found = best(chances), right = found === example.label;
    return element('p', [element('span', when), element('span',
      `${right ? '✓' : '✗'} ${names[found]}`, right ? 'right' : 'wrong'),
    element('span', percent(chances[found]))]);
  };
  const remove = element('button'); // whose cross is in the style sheet: it is no part of its name
  remove.setAttribute('aria-label', `Remove example ${i + 1}`);
  remove.disabled = state.busy;
  remove.onclick = async () => {
    state.examples.splice(i, 1);
    await show();
    focusOn(document.querySelectorAll('#examples button')[i] ?? $('pad'));
  };
  item.append(element('b', names[example.label]), remove, said('was', before));
  if (after) item.append(said('now', after));
  $('examples').append(item);
  pencil.fillStyle = getComputedStyle(small).color;
  example.pixels.forEach((ink, p) => {
    pencil.globalAlpha = ink;
    pencil.fillRect(p % SIDE, Math.floor(p / SIDE), 1, 1);
  });
}

async function show() {
  const turn = ++shows, own = state.examples.map(e => e.pixels);
  const [before, after, base, yours] = [
    await predict(own, state.base), state.yours && await predict(own, state.yours),
    await predict(held.map(e => e.pixels), state.base),
    state.yours && await predict(held.map(e => e.pixels), state.yours)];
  if (turn !== shows) return; // asked again in the meantime
  const right = (rows, list) => rows.filter((r, i) => best(r) === list[i].label).length;
  const count = (rows, list) => rows && list.length ? `${right(rows, list)} of ${list.length}` : '–';
  $('own-base').textContent = count(before, state.examples);
  $('own-yours').textContent = count(after, state.examples);
  $('held-base').textContent = count(base, held);
  $('held-yours').textContent = count(yours, held);
  $('examples').replaceChildren();
  state.examples.forEach((e, i) => showExample(e, i, before[i], after && after[i]));
  $('none').hidden = state.examples.length > 0;
  $('adapters').disabled = !state.yours;
  $('save').disabled = $('serve').disabled = state.busy || !state.yours;
  changed();
}

function changed() {
  drawPad();
  $('train').disabled = state.busy || !state.examples.length;
  $('add').disabled = state.busy || !state.strokes.length;
  if (!state.busy) return showReading();
}

function drawCurve(steps) {
  const [left, right, top, bottom] = [44, 508, 12, 196], {losses} = state;
  const peak = losses.length ? Math.max(...losses, 0.01) : 1;
  const power = 10 ** Math.floor(Math.log10(peak));
  const most = [1, 2, 3, 4, 6, 8, 10].map(m => m * power).find(m => m >= peak);
  const x = t => left + (right - left) * (steps > 1 ? (t - 1) / (steps - 1) : 0.5);
  const y = loss => bottom - (bottom - top) * loss / most;
  const made = (tag, attributes, text = '') => {
    const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  const parts = [0, 0.5, 1].flatMap(f => [
    made('path', {class: 'grid', d: `M${left} ${y(f * most)}H${right}`}),
    made('text', {x: left - 8, y: y(f * most) + 5, 'text-anchor': 'end'},
      losses.length ? String(+(f * most).toPrecision(2)) : '')]);
  for (const t of new Set([1, Math.round((1 + steps) / 2), steps]))
    parts.push(made('text', {x: x(t), y: bottom + 22, 'text-anchor': 'middle'}, String(t)));
  parts.push(made('path', {class: 'line',
    d: losses.map((loss, i) => `${i ? 'L' : 'M'}${x(i + 1)} ${y(loss)}`).join('')}));
  $('curve').replaceChildren(...parts);
  $('loss').textContent = losses.length
    ? `loss ${losses[0].toPrecision(3)} → ${losses.at(-1).toPrecision(3)}` : '';
}

// ── what is pressed ────────────────────────────────────────────────────────────────────────────

/** A matrix the other way round: an Adapter has [rank, in] and [out, rank], a graph's input not. */
function turned({dims: [rows, columns], data}) {
  return {dims: [columns, rows], data: data.map(
    (_, i) => data[i % rows * columns + Math.floor(i / rows)])};
}

function download(name, adapter, version) {
  const link = element('a');
  link.href = URL.createObjectURL(new Blob([write(adapter, version)]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function chips() {
  const own = $('classes').firstElementChild;
  $('classes').prepend(...names.flatMap((name, i) => {
    const radio = element('input'), label = element('label', [radio, element('span', name)]);
    Object.assign(radio, {type: 'radio', name: 'class', value: i, checked: i === DIGITS});
    label.className = i < DIGITS ? '' : 'new';
    return i === DIGITS ? [element('i'), label] : label;
  }));
  const named = () => {
    own.classList.toggle('hidden', chosen() < DIGITS);
    $('name').value = names[chosen()];
  };
  $('classes').onchange = named;
  named();
  $('name').oninput = () => {
    names[chosen()] = $('name').value || '?';
    document.querySelectorAll('#classes :not(.name) > span')[chosen()].textContent = names[chosen()];
    show();
  };
}

/** Give the keys to an element, where the one that had them is gone or disabled. */
function focusOn(element) {
  const {activeElement} = document;
  if (activeElement === document.body || activeElement.disabled) element.focus();
}

function say(text, error = false) {
  $('status').textContent = text;
  $('status').classList.toggle('error', error);
}

/** Work of which there is one at a time; what goes wrong is said. */
async function busily(work) {
  state.busy = true;
  changed();
  try {
    say(await work());
  } catch (error) {
    say(`Error: ${error.message ?? error}`, true);
  }
  state.busy = false;
}

$('clear').onclick = () => {
  state.strokes = [];
  pen.isDown = false;
  changed();
};
$('add').onclick = () => {
  state.examples.push({pixels: pixelsOf(state.strokes), label: chosen()});
  state.strokes = [];
  changed(); // at once: what show() asks the network may take a while
  focusOn($('pad'));
  return show();
};
$('train').onclick = async () => {
  const steps = Math.min(Math.max(Math.round(Number($('steps').value)) || 1, 1), 500);
  $('steps').value = steps;
  await busily(async () => {
    say(`Training on ${state.examples.length} examples …`);
    const start = performance.now();
    await train(steps);
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    return `${steps} steps in ${seconds} s on WebAssembly.`;
  });
  document.querySelector('#adapters [value=yours]').checked = Boolean(state.yours);
  await show();
  focusOn($('train'));
};
$('adapters').onchange = showReading;
$('save').onclick = () => download('adapter.onnx_adapter', Object.fromEntries(
  Object.entries(state.yours).map(([name, tensor]) => [name, turned(tensor)])));
$('serve').onclick = () => download('served.onnx_adapter', state.yours, SERVED);
matchMedia('(prefers-color-scheme: dark)').onchange = show;
chips();
followPointer();
followKeys();
await busily(load);
if (state.base) {
  $('shown').textContent = shown.length;
  drawCurve(30);
  await show();
}
