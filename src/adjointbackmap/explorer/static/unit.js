// The chosen unit: its hyperplane, its receipt, and how the modes add up.

import { ask, newest } from "./net.js";
import * as draw from "./draw.js";
import { chosen, network } from "./network.js";
import { state, unitNumbers } from "./state.js";
import { drawWords, nameOf } from "./words.js";

const $ = (id) => document.getElementById(id);
const VIEWS = { H: "H", xH: "x · H", over: "Over the photo", channels: "Channels", spectrum: "Spectrum" };
const KEPT = 200; // answers of units
const SOON = 80; // milliseconds until "computing" is shown

export const unit = { answer: null, key: "", part: null };
const kept = new Map();

const keyOf = () => [state.net, state.img, state.layer, state.mode, unitNumbers(chosen())].join("|");

/** Ask for the chosen unit, and draw it. */
export const loadUnit = newest(async () => {
  const key = keyOf();
  drawTitle();
  let answer = kept.get(key);
  if (!answer) {
    const waiting = setTimeout(() => showComputing(true), SOON);
    try {
      const words = {
        net: state.net, img: state.img, layer: state.layer,
        unit: unitNumbers(chosen()).join(","), mode: state.mode,
      };
      answer = await ask("unit", words);
    } finally {
      clearTimeout(waiting);
      showComputing(false);
    }
    if (answer === null) return;
    kept.set(key, answer);
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  }
  if (key !== keyOf()) return; // the next call draws the unit that is chosen by now
  Object.assign(unit, { answer, key });
  drawUnit();
  drawReceipt();
  if ($("sums").open) loadSums();
  document.dispatchEvent(new CustomEvent("unit-drawn", { detail: key }));
});

function showComputing(is) {
  $("computing").hidden = !is;
}

const WORDS = {
  out_row: "row", out_col: "column", in_channel: "in-channel", out_channel: "channel",
  out_feature: "unit", out_position_0: "position",
};

function drawTitle() {
  const layer = chosen();
  const names = Object.keys(layer.modes[state.mode]);
  const named = (n, name) => (state.text ? nameOf(layer, name, n) : `${WORDS[name] ?? name} ${n}`);
  const parts = unitNumbers(layer).map((n, i) => named(n, names[i]));
  const isClass = state.mode === "RM0" && layer.shape[0] === network.info.classes.length;
  const name = isClass ? `${network.info.classes[state.channel]} — ` : "";
  $("unit").textContent = `${name}${[layer.name, ...parts].join(", ")}`;
  for (const button of $("modes").children) button.setAttribute("aria-pressed", button.dataset.mode === state.mode);
  for (const button of $("views").children) button.setAttribute("aria-pressed", button.dataset.view === state.view);
  $("in-channel").hidden = !names.includes("in_channel");
  $("j").value = state.j;
  $("j").max = (layer.modes[state.mode].in_channel ?? 1) - 1;
}

/** The buttons for modes and views. */
export function makeSwitches(changed) {
  const layer = chosen();
  const buttons = Object.keys(layer.modes).sort().map((mode) => {
    const button = document.createElement("button");
    button.textContent = mode;
    button.dataset.mode = mode;
    button.title = {
      RM0: "One output", RM1: "One channel, summed over positions", RM2: "One unit",
      RM3: "One kernel, summed over positions", RM4: "One kernel at one position",
    }[mode];
    button.addEventListener("click", () => changed({ mode }));
    return button;
  });
  $("modes").replaceChildren(...buttons);
  if ($("views").children.length) return;
  $("views").replaceChildren(...Object.entries(VIEWS).map(([view, words]) => {
    const button = document.createElement("button");
    button.textContent = words;
    button.dataset.view = view;
    button.addEventListener("click", () => changed({ view }));
    return button;
  }));
}

/** The hyperplane on the whole image: zero outside its receptive field. */
export function whole(part, box) {
  const [channels, rows, columns] = network.info.shape;
  const [row, column, height, width] = box;
  const full = new Float32Array(channels * rows * columns);
  for (let c = 0; c < channels; c++) {
    for (let r = 0; r < height; r++) {
      const from = (c * height + r) * width;
      full.set(part.subarray(from, from + width), (c * rows + row + r) * columns + column);
    }
  }
  return full;
}

/** A map on the part of the image that is shown: all of it, or the receptive field. */
function cut(map, channels, [row, column, height, width]) {
  const [, rows, columns] = network.info.shape;
  const found = new Float32Array(channels * height * width);
  for (let c = 0; c < channels; c++) {
    for (let r = 0; r < height; r++) {
      const from = (c * rows + row + r) * columns + column;
      found.set(map.subarray(from, from + width), (c * height + r) * width);
    }
  }
  return found;
}

/** What part of the image is shown. */
function frame() {
  const [, rows, columns] = network.info.shape;
  return state.zoom ? unit.answer.box : [0, 0, rows, columns];
}

/** The images of a view, each with its name: one, or one for each channel. */
function pictures(view) {
  const [channels] = network.info.shape;
  const shown = frame();
  const [, , rows, columns] = shown;
  const n = rows * columns;
  const H = cut(whole(unit.answer.arrays.H, unit.answer.box), channels, shown);
  const x = cut(network.overview.arrays.x, channels, shown);
  const sharper = 40 ** (state.contrast / 100);
  if (view === "spectrum") {
    const size = draw.spectrum(draw.summed(H, channels, n), rows, columns);
    return { limit: draw.largest(size), images: [["", draw.magnitudes(size, rows, columns)]], isSize: true };
  }
  if (view === "channels") {
    const limit = draw.limitOf(H) / sharper;
    const names = channels === 3 ? ["red", "green", "blue"] : ["grey"];
    const images = names.map((name, c) => [name, draw.signed(H.subarray(c * n, (c + 1) * n), rows, columns, limit)]);
    const all = draw.summed(H, channels, n);
    images.push(["sum", draw.signed(all, rows, columns, draw.limitOf(all) / sharper)]);
    return { limit, images };
  }
  if (view === "H" && channels === 3) {
    const limit = draw.limitOf(H) / sharper;
    return { limit, images: [["", draw.coloured(H, rows, columns, limit)]], isColour: true };
  }
  const map = draw.summed(view === "xH" ? draw.product(x, H) : H, channels, n);
  const limit = draw.limitOf(map) / sharper;
  if (view !== "over") return { limit, images: [["", draw.signed(map, rows, columns, limit)]] };
  const pixels = cut(network.overview.arrays.pixels, channels, shown);
  return { limit, images: [["", draw.over(pixels, channels, map, rows, columns, limit)]] };
}

/** Draw the hyperplane in the chosen view. */
export function drawUnit() {
  if (!unit.answer) return;
  drawTitle();
  if (state.text) return drawWords(unit.answer, drawScale);
  const { context, width, height } = draw.fitted($("plane"));
  const [, , rows, columns] = frame();
  const found = pictures(state.view);
  const across = found.images.length > 1 ? 2 : 1;
  const gap = across > 1 ? 6 : 0;
  const [w, h] = [(width - gap) / across, (height - gap) / across];
  found.images.forEach(([name, image], i) => {
    const scale = Math.min(w / columns, h / rows);
    const x = (i % across) * (w + gap) + (w - columns * scale) / 2;
    const y = Math.floor(i / across) * (h + gap) + (h - rows * scale) / 2;
    draw.put(context, image, x, y, columns * scale, rows * scale);
    if (state.view !== "spectrum") drawBox(context, unit.answer.box, x, y, scale);
    if (name) drawName(context, name, x, y);
  });
  drawScale(found);
  drawKept();
}

/** The receptive field as a box, unless it is all that is shown. */
export function drawBox(context, [row, column, height, width], x, y, scale) {
  const [, rows, columns] = network.info.shape;
  if (state.zoom || (height === rows && width === columns)) return;
  context.strokeStyle = draw.colour("--field");
  context.lineWidth = 1.5;
  context.strokeRect(x + column * scale, y + row * scale, width * scale, height * scale);
}

function drawName(context, name, x, y) {
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = draw.colour("--panel");
  context.fillRect(x + 4, y + 4, context.measureText(name).width + 8, 16);
  context.fillStyle = draw.colour("--ink");
  context.textBaseline = "top";
  context.fillText(name, x + 8, y + 6.5);
}

function drawScale({ limit, isSize, isColour }) {
  const columns = 66;
  const ramp = Float32Array.from({ length: columns }, (_, i) => (2 * i) / (columns - 1) - 1);
  let image = draw.signed(ramp, 1, columns, 1);
  if (isColour) image = draw.coloured(Float32Array.from([...ramp, ...ramp, ...ramp]), 1, columns, 1);
  if (isSize) image = draw.magnitudes(ramp.map((v) => 10 ** (2 * v - 2)), 1, columns);
  const { context, width, height } = draw.fitted($("bar"));
  draw.put(context, image, 0, 0, width, height);
  $("low").textContent = isSize ? draw.short(limit / 1e4, 2) : draw.short(-limit, 2);
  $("high").textContent = draw.short(limit, 2);
}

/** What the pixel under the pointer adds. */
export function readPixel(event) {
  if (!unit.answer || state.text || state.view === "spectrum" || state.view === "channels") return;
  const box = $("plane").getBoundingClientRect();
  const [row, column, rows, columns] = frame();
  const scale = Math.min(box.width / columns, box.height / rows);
  const c = Math.floor((event.clientX - box.left - (box.width - columns * scale) / 2) / scale);
  const r = Math.floor((event.clientY - box.top - (box.height - rows * scale) / 2) / scale);
  if (r < 0 || c < 0 || r >= rows || c >= columns) return;
  const [channels, height, width] = network.info.shape;
  const H = whole(unit.answer.arrays.H, unit.answer.box);
  const at = (map, k) => map[(k * height + row + r) * width + column + c];
  const all = Array.from({ length: channels }, (_, k) => k);
  const adds = all.reduce((sum, k) => sum + at(H, k) * at(network.overview.arrays.x, k), 0);
  const words = all.map((k) => draw.short(at(H, k), 2)).join(", ");
  $("readout").textContent = `row ${row + r}, column ${column + c}: H = ${words}; x · H = ${withZero(adds)}`;
}

const withZero = (v) => (v === 0 ? "0" : draw.withSign(v));

// beside another unit

let keptUnit = null;

/** Keep the unit that is shown beside those that come next, or let it go. */
export function keepUnit() {
  const { answer } = unit;
  const shape = network.info.shape;
  const words = `${$("unit").textContent} (${state.mode}), ${state.net}, ${network.overview.words.split(" (")[0]}`;
  keptUnit = keptUnit ? null : { map: whole(answer.arrays.H, answer.box), answer, shape, words };
  $("keep").setAttribute("aria-pressed", keptUnit !== null);
  drawKept();
}

function drawKept() {
  $("kept").hidden = keptUnit === null;
  if (!keptUnit) return;
  const now = whole(unit.answer.arrays.H, unit.answer.box);
  const fits = keptUnit.shape.join() === network.info.shape.join();
  const limit = Math.max(draw.limitOf(keptUnit.map), fits ? draw.limitOf(now) : 0);
  drawCompared("kept", keptUnit.map, keptUnit.shape, limit);
  drawCompared("now", now, network.info.shape, fits ? limit : draw.limitOf(now));
  const difference = fits ? now.map((v, i) => v - keptUnit.map[i]) : null;
  drawCompared("difference", difference, network.info.shape, limit);
  const [a, b] = [keptUnit.answer, unit.answer];
  $("kept-words").textContent = `Kept: ${keptUnit.words}. Its value is ${draw.short(a.value, 5)}, now ${draw.short(b.value, 5)}; `
    + `pixels add ${draw.withSign(a.pixels, 3)}, now ${draw.withSign(b.pixels, 3)}.`
    + (fits ? ` Cosine of the two H: ${cosine(keptUnit.map, now).toFixed(3)}.` : "");
}

function cosine(a, b) {
  let [product, left, right] = [0, 0, 0];
  a.forEach((v, i) => {
    product += v * b[i];
    left += v * v;
    right += b[i] * b[i];
  });
  return product / (Math.sqrt(left * right) || 1);
}

function drawCompared(name, map, [channels, rows, columns], limit) {
  const { context, width, height } = draw.fitted($(`c-${name}`));
  if (!map) return;
  const image = channels === 3
    ? draw.coloured(map, rows, columns, limit)
    : draw.signed(map, rows, columns, limit);
  draw.put(context, image, 0, 0, width, height);
}

// the receipt

function line(name, from, to, low, high, kind, amount, choose) {
  const row = document.createElement(choose ? "button" : "div");
  row.className = "line";
  const at = (v) => (100 * (v - low)) / (high - low);
  const [a, b] = [Math.min(from, to), Math.max(from, to)];
  row.innerHTML = `<span></span><span class="track"><u style="left:${at(0)}%"></u>`
    + `<i class="${kind}" style="left:${at(a)}%;width:${at(b) - at(a)}%"></i></span><span></span>`;
  row.firstChild.textContent = name;
  row.firstChild.title = name;
  row.lastChild.textContent = kind === "total" ? draw.short(amount, 5) : draw.withSign(amount, 4);
  if (choose) {
    row.setAttribute("aria-pressed", unit.part === name);
    row.addEventListener("click", choose);
  }
  return row;
}

/** The receipt as a waterfall that closes: pixels, then each layer's biases. */
export function drawReceipt() {
  const { answer } = unit;
  const lines = [{ name: state.text ? "words" : "pixels", adds: answer.pixels }, ...answer.biases];
  let sum = 0;
  const ends = lines.map(({ adds }) => [sum, (sum += adds)]);
  const all = [0, answer.value, ...ends.flat()];
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const wide = high - low || 1;
  const limits = [low - 0.02 * wide, high + 0.02 * wide];
  const rows = lines.map(({ name, adds }, i) => {
    const choose = i === 0 ? null : () => choosePart(name);
    return line(name, ...ends[i], ...limits, adds >= 0 ? "up" : "down", adds, choose);
  });
  rows.push(line("sum", 0, answer.sum, ...limits, "total", answer.sum, null));
  $("rows").replaceChildren(...rows);
  $("receipt-sum").textContent = answer.sum.toPrecision(7).replace("-", "−");
  $("model-value").textContent = answer.value.toPrecision(7).replace("-", "−");
  $("receipt-error").textContent = answer.error.toExponential(1).replaceAll("-", "−");
  $("receipt-sum").dataset.value = answer.sum;
  $("model-value").dataset.value = answer.value;
  $("receipt-error").dataset.value = answer.error;
  drawPart();
}

function choosePart(name) {
  unit.part = unit.part === name ? null : name;
  drawReceipt();
}

/** One layer's part of H_b, as bars. */
function drawPart() {
  const part = network.info.biases.find((each) => each.name === unit.part);
  $("part").hidden = !part;
  if (!part) return;
  const H = unit.answer.arrays.H_b.subarray(part.start, part.stop);
  const b = network.overview.biases.slice(part.start, part.stop);
  const adds = Array.from(H, (v, i) => v * b[i]);
  $("part").innerHTML = `<small></small><canvas aria-hidden="true"></canvas><small></small><canvas aria-hidden="true"></canvas>`;
  const [first, above, second, below] = $("part").children;
  first.textContent = `H_b of ${part.name}: ${H.length} numbers, largest ${draw.short(draw.largest(H), 3)}`;
  second.textContent = `b · H_b: they sum to ${draw.withSign(adds.reduce((s, v) => s + v, 0), 4)}`;
  bars(above, H);
  bars(below, adds);
}

function bars(canvas, numbers) {
  const { context, width, height } = draw.fitted(canvas);
  const limit = draw.largest(numbers);
  const step = width / numbers.length;
  numbers.forEach((v, i) => {
    const size = (Math.abs(v) / limit) * (height / 2 - 2);
    context.fillStyle = draw.colour(v > 0 ? "--raises" : "--lowers");
    context.fillRect(i * step, v > 0 ? height / 2 - size : height / 2, Math.max(0.8, step - 1), Math.max(size, 0.5));
  });
  context.fillStyle = draw.colour("--line");
  context.fillRect(0, height / 2, width, 1);
}

// how the modes add up

/** Ask for the sums over in-channels, and draw them. */
export const loadSums = newest(async () => {
  const layer = chosen();
  if (state.text) return;
  if (!("RM4" in layer.modes)) {
    $("sums-body").innerHTML = `<p class="words">This layer has no kernel with in-channels: choose a convolution.</p>`;
    return;
  }
  const words = { net: state.net, img: state.img, layer: state.layer, unit: unitNumbers(layer, "RM2").join(",") };
  const answer = await ask("modes", words);
  if (answer === null) return;
  $("sums-body").replaceChildren(...answer.sums.map((each) => sumOf(each, answer.arrays)));
});

function sumOf(found, arrays) {
  const block = document.createElement("div");
  block.className = "sum";
  const over = found.from === "RM4" ? "of this unit" : "of this channel, summed over positions";
  const share = found.difference / found.largest;
  const words = document.createElement("p");
  words.className = "words";
  // without a bias of its own, what is left is rounding
  const isRounding = Math.abs(found.own) < 1e-5 * draw.largest(found.values);
  const own = isRounding ? "" : `, its own bias ${draw.withSign(found.own, 3)}`;
  words.textContent = `${found.from} → ${found.into}: the ${found.values.length} kernels ${over} add `
    + `${draw.withSign(found.values.reduce((s, v) => s + v, 0), 4)}${own}. The value is ${draw.short(found.value, 4)}. The hyperplanes sum to ${found.into}'s; the largest difference is ${share.toExponential(0)} of its largest number.`;
  const parts = document.createElement("div");
  parts.className = "parts";
  const all = arrays[`${found.from} parts`];
  const [, ...shape] = all.shape;
  const size = shape.reduce((a, b) => a * b, 1);
  const limit = draw.limitOf(all);
  found.shown.forEach((j, i) => {
    const map = all.subarray(i * size, (i + 1) * size);
    parts.append(figure(map, shape, limit, `${j}: ${draw.withSign(found.values[j], 2)}`), " + ");
  });
  parts.append(found.values.length > found.shown.length ? "… = " : "= ");
  const total = arrays[`${found.into} sum`];
  parts.append(figure(total, shape, draw.limitOf(total), found.into));
  block.append(words, parts);
  return block;
}

function figure(map, [channels, rows, columns], limit, words) {
  const made = document.createElement("figure");
  const image = channels === 3
    ? draw.coloured(map, rows, columns, limit)
    : draw.signed(draw.summed(map, channels, rows * columns), rows, columns, limit);
  const caption = document.createElement("figcaption");
  caption.textContent = words;
  made.append(draw.small(image), caption);
  return made;
}
