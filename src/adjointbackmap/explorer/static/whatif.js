// What if the image were another: paint, or slide along a way; the state of the unit's region.

import { ask, newest } from "./net.js";
import * as draw from "./draw.js";
import { chosen, network } from "./network.js";
import { state, unitNumbers } from "./state.js";
import { unit } from "./unit.js";

const $ = (id) => document.getElementById(id);
const GREY = 0.5; // of an erased pixel
const ERASER = "grey"; // its name in the address, in the place of a colour
const STRIKES = 50; // milliseconds between two questions while painting

export const edit = { pixels: null, end: null, tool: "", brush: [0, 0], last: 0 };

const words = () => ({
  net: state.net, img: state.img, layer: state.layer,
  unit: unitNumbers(chosen()).join(","), mode: state.mode,
});

const original = () => Float64Array.from(network.overview.arrays.pixels);

/** The image that is shown: the edited one, or the original. */
export const shownPixels = () => edit.pixels ?? network.overview.arrays.pixels;

/** Draw the image with the receptive field, and the brush. */
export function drawPhoto() {
  if (!network.overview || state.text) return;
  const [channels, rows, columns] = network.info.shape;
  const { context, width, height } = draw.fitted($("photo"));
  const scale = Math.min(width / columns, height / rows);
  const [x, y] = [(width - columns * scale) / 2, (height - rows * scale) / 2];
  draw.put(context, draw.photo(shownPixels(), channels, rows, columns), x, y, columns * scale, rows * scale);
  const box = fieldBox();
  context.strokeStyle = draw.colour("--field");
  context.lineWidth = 2;
  if (box) context.strokeRect(x + box[1] * scale, y + box[0] * scale, box[3] * scale, box[2] * scale);
  if (edit.tool) {
    const size = Number($("size").value);
    const half = Math.floor(size / 2);
    context.strokeStyle = draw.colour("--accent");
    context.strokeRect(x + (edit.brush[1] - half) * scale, y + (edit.brush[0] - half) * scale, size * scale, size * scale);
  }
}

/** The receptive field of the chosen unit, from the geometry alone: it needs no answer. */
function fieldBox() {
  const { axes, modes } = chosen();
  const [, rows, columns] = network.info.shape;
  if (axes.length !== 2 || !("out_row" in modes[state.mode])) return null;
  const ends = axes.map(([step, low, high], i) => {
    const p = [state.row, state.col][i];
    const extent = [rows, columns][i];
    return [Math.max(0, Math.ceil(p * step + low)), Math.min(extent - 1, Math.floor(p * step + high))];
  });
  const [[top, bottom], [left, right]] = ends;
  if (bottom - top + 1 >= rows && right - left + 1 >= columns) return null;
  return [top, left, bottom - top + 1, right - left + 1];
}

/** Paint at the brush's place. */
export function paint() {
  const brush = `${edit.tool === "erase" ? ERASER : $("colour").value.slice(1)}-${$("size").value}`;
  const place = edit.brush.join(".");
  state.way = "";
  dab(brush, edit.brush);
  // the address lists each brush with its places: ffffff-3:12.5,12.6;grey-1:4.4
  const [last, places] = state.paint.slice(state.paint.lastIndexOf(";") + 1).split(":");
  if (last !== brush) state.paint += `${state.paint && ";"}${brush}:${place}`;
  else if (!`,${places}`.endsWith(`,${place}`)) state.paint += `,${place}`;
  $("whatif-words").textContent = "";
  drawPhoto();
  loadWhatif();
}

/** One dab of a brush, such as ffffff-3, on the pixels. */
function dab(brush, [row, column]) {
  const [channels, rows, columns] = network.info.shape;
  edit.pixels ??= original();
  const [name, size] = [brush.split("-")[0], Number(brush.split("-")[1])];
  const half = Math.floor(size / 2);
  const ink = [0, 2, 4].map((i) => (name === ERASER ? GREY : parseInt(name.slice(i, i + 2), 16) / 255));
  for (let r = row - half; r < row - half + size; r++) {
    for (let c = column - half; c < column - half + size; c++) {
      if (r < 0 || c < 0 || r >= rows || c >= columns) continue;
      for (let k = 0; k < channels; k++) edit.pixels[(k * rows + r) * columns + c] = ink[k];
    }
  }
}

/** Paint what an address lists. */
export function paintAgain(text) {
  if (!/^((grey|[0-9a-f]{6})-[1-9]:\d+\.\d+(,\d+\.\d+)*(;|$))+$/.test(text)) return;
  for (const part of text.split(";").filter(Boolean)) {
    const [brush, places] = part.split(":");
    for (const place of places.split(",")) dab(brush, place.split(".").map(Number));
  }
  state.paint = text;
  drawPhoto();
  loadWhatif();
}

/** The pixel under the pointer. */
export function pixelAt(event) {
  const box = $("photo").getBoundingClientRect();
  const [, rows, columns] = network.info.shape;
  const scale = Math.min(box.width / columns, box.height / rows);
  const c = Math.floor((event.clientX - box.left - (box.width - columns * scale) / 2) / scale);
  const r = Math.floor((event.clientY - box.top - (box.height - rows * scale) / 2) / scale);
  return [r, c];
}

/** Ask what becomes of the unit, and show it. */
export const loadWhatif = newest(async () => {
  if (state.text) return;
  if (edit.pixels === null) return showSame();
  const wait = edit.last + STRIKES - performance.now();
  if (wait > 0) await new Promise((done) => setTimeout(done, wait));
  edit.last = performance.now();
  const answer = await ask("whatif", words(), edit.pixels);
  if (answer !== null && edit.pixels !== null) show(answer);
});

function showSame() {
  $("state").className = "state same";
  $("state").dataset.state = "same";
  $("state").textContent = "Same hyperplane: it gives the value";
  $("flipped").textContent = "0";
  $("flip-list").textContent = "";
  for (const name of ["before", "after", "difference"]) drawMap(name, null);
  $("prediction").textContent = network.overview.prediction ?? network.info.shape.join(" × ");
  document.dispatchEvent(new CustomEvent("whatif-drawn"));
}

function show(answer) {
  const is = answer.same;
  $("state").className = `state ${is ? "same" : "other"}`;
  $("state").dataset.state = is ? "same" : "other";
  const gives = `${draw.short(answer.old, 4)}, the model ${draw.short(answer.value, 4)}`;
  $("state").textContent = is
    ? `Same hyperplane: it still gives the value, ${draw.short(answer.value, 5)}`
    : `Another hyperplane: the old one gives ${gives}`;
  $("flipped").textContent = answer.count;
  const listed = answer.flipped.slice(0, 6).map(({ name, count }) => `${name} ${count}`);
  if (answer.flipped.length > 6) listed.push("…");
  $("flip-list").textContent = listed.length ? `(${listed.join(", ")})` : "";
  const { before, after } = answer.arrays;
  const limit = draw.limitOf(before);
  drawMap("before", before, limit);
  drawMap("after", after, limit);
  drawMap("difference", after.map((v, i) => v - before[i]), limit);
  if (answer.prediction !== null) {
    const old = network.overview.prediction;
    $("prediction").textContent = answer.prediction === old ? old : `${answer.prediction} (was ${old})`;
  }
  document.dispatchEvent(new CustomEvent("whatif-drawn"));
}

function drawMap(name, map, limit) {
  const { context, width, height } = draw.fitted($(`h-${name}`));
  if (map === null || !unit.answer) return;
  const [channels] = network.info.shape;
  const [, , rows, columns] = unit.answer.box;
  if (map.length !== channels * rows * columns) return;
  const image = channels === 3
    ? draw.coloured(map, rows, columns, limit)
    : draw.signed(map, rows, columns, limit);
  draw.put(context, image, 0, 0, width, height);
}

// along a way

/** Move along a way: the straight line from the image to the end that the server gives. */
export async function follow(way, t = 1) {
  const button = $(`to-${way}`);
  button.disabled = true;
  $("whatif-words").textContent = "computing…";
  try {
    const answer = await ask(way, { ...words(), panel: "way" });
    if (answer === null) return;
    const { pixels, rest } = answer.arrays;
    edit.end = Float64Array.from(pixels, (v, i) => v + rest[i]);
    Object.assign(state, { way, t, paint: "" });
    $("whatif-words").textContent = `The way leads to ${answer.what}, ${draw.short(answer.distance, 3)} away in l2.`;
    $("slide").disabled = false;
    slideTo(t);
    loadTicks();
  } finally {
    button.disabled = false;
    if ($("whatif-words").textContent === "computing…") $("whatif-words").textContent = "";
  }
}

/** Put the image at a share of the way. */
export function slideTo(t) {
  state.t = t;
  const start = original();
  edit.pixels = t === 0 ? null : start.map((v, i) => v + t * (edit.end[i] - v));
  $("slide").value = Math.round(1000 * t);
  $("slide-words").textContent = `${(100 * t).toFixed(1)} % of the way`;
  drawPhoto();
  loadWhatif();
}

/** The breakpoints as ticks: they come in parts, as long as the way and the unit are the same. */
const loadTicks = newest(async () => {
  const { end } = edit;
  if (!end) return; // the image was put back meanwhile
  const key = JSON.stringify(words());
  draw.fitted($("ticks"));
  $("tick-words").textContent = "; looking for breakpoints…";
  for (let regions = 100; ; regions += Math.min(regions, 500)) {
    const answer = await ask("breakpoints", { ...words(), regions }, end);
    if (answer === null || edit.end !== end || key !== JSON.stringify(words())) return;
    const { context, width, height } = draw.fitted($("ticks"));
    context.fillStyle = draw.colour("--warn");
    for (const t of answer.t) context.fillRect(8 + t * (width - 16), 0, 1, height);
    const known = answer.until < 1 ? ` up to ${(100 * answer.until).toFixed(0)} %` : "";
    $("tick-words").textContent = `; ${answer.t.length + 1} regions of this unit${known}`;
    if (answer.last) return;
  }
});

/** Look for the breakpoints of another unit on the same way. */
export function renewTicks() {
  if (state.way && edit.end) loadTicks();
}

/** Back to the original image. */
export function reset() {
  Object.assign(edit, { pixels: null, end: null });
  Object.assign(state, { way: "", t: 0, paint: "" });
  $("slide").value = 0;
  $("slide").disabled = true;
  $("slide-words").textContent = "Paint on the image, or choose a way.";
  $("whatif-words").textContent = "";
  $("tick-words").textContent = "";
  draw.fitted($("ticks"));
  drawPhoto();
  loadWhatif();
}
