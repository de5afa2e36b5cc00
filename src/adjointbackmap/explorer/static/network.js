// The network as columns of tiles, and the tiles of the chosen layer.

import { ask, newest } from "./net.js";
import { colour, fitted, isDark, largest, put, short, signed, small } from "./draw.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);
const COLUMN = 54;
const GAP = 8;

export const network = { info: null, overview: null, maps: null, start: 0, perPage: 1, shape: null };

/** The chosen layer. */
export const chosen = () => network.info.layers.find((each) => each.name === state.layer);

const times = " × ";

/** Draw all layers as columns, with skip connections above them. */
export function drawStrip(choose) {
  const { layers, skips } = network.info;
  const place = new Map(layers.map((each, i) => [each.name, i]));
  const middle = (name) => place.get(name) * (COLUMN + GAP) + COLUMN / 2;
  const height = skips.length ? 24 : 2;
  const paths = skips.map(([from, to]) => {
    const [a, b] = [middle(from), middle(to)];
    return `<path d="M${a} ${height} C${a} ${height - 26} ${b} ${height - 26} ${b} ${height}"/>`;
  });
  const width = layers.length * (COLUMN + GAP);
  const columns = document.createElement("div");
  columns.className = "columns";
  columns.append(...layers.map((each) => column(each, choose)));
  $("strip").innerHTML = `<svg class="arcs" aria-hidden="true" width="${width}" height="${height}">${paths.join("")}</svg>`;
  $("strip").append(columns);
  const count = layers.reduce((sum, each) => sum + each.units, 0);
  const joined = skips.length ? `, ${skips.length} skip connections` : "";
  $("network-words").textContent = `${layers.length} layers, ${count.toLocaleString("en")} units${joined}`;
  const { note } = network.info;
  if (note) $("network-words").textContent += `; ${note}`;
  $("note").textContent = note && `${note[0].toUpperCase()}${note.slice(1)}.`;
  $("note").hidden = !note;
}

function column(layer, choose) {
  const button = document.createElement("button");
  button.className = "column";
  button.dataset.layer = layer.name;
  const title = `${layer.kind}, ${layer.shape.join(times)}; ${state.text ? "" : `receptive field ${layer.field.join(times)} pixels; `}`
    + `${layer.units.toLocaleString("en")} units; ${Object.keys(layer.modes).join(" ")}; a hyperplane takes ${layer.work}`;
  button.title = title;
  button.setAttribute("aria-label", `Layer ${layer.name}: ${title}`);
  button.innerHTML = `<b></b><small>${layer.shape.join("×")}</small>`;
  button.firstChild.textContent = layer.name;
  const tiles = network.overview?.arrays[`tiles ${layer.name}`];
  if (tiles) {
    const [count, rows, columns] = tiles.shape;
    const limit = largest(tiles);
    for (let i = 0; i < count; i++) {
      const map = tiles.subarray(i * rows * columns, (i + 1) * rows * columns);
      button.append(small(signed(map, rows, columns, limit)));
    }
  }
  button.addEventListener("click", () => choose(layer.name));
  return button;
}

/** Mark the chosen layer. */
export function markLayer() {
  for (const each of $("strip").querySelectorAll(".column")) {
    const is = each.dataset.layer === state.layer;
    each.setAttribute("aria-pressed", is);
    if (is) {
      const strip = $("strip");
      const left = each.offsetLeft;
      if (left < strip.scrollLeft || left + COLUMN > strip.scrollLeft + strip.clientWidth) {
        strip.scrollLeft = left - strip.clientWidth / 2;
      }
    }
  }
  const layer = chosen();
  $("layer").textContent = layer.name;
  $("layer-words").textContent = `${layer.kind}, ${layer.shape.join(times)}${state.text ? "" : `, field ${layer.field.join(times)}`}`;
}

/** How the tiles are laid out on the canvas. */
function layout(width, height, [count, rows, columns]) {
  if (chosen().one) return { across: 1, down: 1, wide: width, high: height };
  const isFlat = rows * columns === 1;
  const least = isFlat ? 84 : Math.max(46, Math.min(104, 3 * columns));
  let across = Math.max(1, Math.min(count, Math.floor((width + 6) / (least + 6))));
  // few tiles are as large as lets all of them fit
  const wideOf = (n) => Math.min(isFlat ? Infinity : 150, (width - 6 * (n - 1)) / n);
  const highOf = (n) => (isFlat ? 46 : (wideOf(n) * rows) / columns);
  for (let n = 1; n < across && !isFlat; n++) {
    if (Math.ceil(count / n) * (highOf(n) + 6) <= height + 6) across = n;
  }
  const wide = wideOf(across);
  const high = highOf(across);
  const down = Math.max(1, Math.floor((height + 6) / (high + 6)));
  return { across, down, wide, high };
}

/** Ask for the tiles of the page with the chosen channel, and draw them. */
export const loadTiles = newest(async () => {
  const layer = chosen();
  const { width, height } = $("tiles").getBoundingClientRect();
  const found = layout(width, height, layer.tiles);
  const perPage = Math.max(1, found.across * found.down);
  const tile = layer.tiles[0] === 1 ? 0 : state.channel;
  const start = Math.floor(tile / perPage) * perPage;
  const key = [state.net, state.img, layer.name, start, perPage].join();
  if (network.key !== key) {
    const words = { net: state.net, img: state.img, layer: layer.name, start, count: perPage };
    const answer = await ask("maps", words);
    if (answer === null) return;
    Object.assign(network, { key, maps: answer.arrays.maps, start, perPage, shape: layer.tiles, of: layer.name });
  }
  drawTiles();
});

// The tiles without marks: pointing at another unit of the same page draws them from here.
const plain = { key: "", canvas: document.createElement("canvas") };

/** Draw the tiles, and mark the chosen unit. */
export function drawTiles() {
  if (!network.maps || network.of !== state.layer) return;
  const { context, width, height } = fitted($("tiles"));
  const { canvas } = context;
  const { across, wide, high } = layout(width, height, network.shape);
  const key = [network.key, canvas.width, canvas.height, state.mode, isDark()].join();
  if (plain.key === key) {
    context.save();
    context.resetTransform(); // both canvases have the screen's pixels
    context.drawImage(plain.canvas, 0, 0);
    context.restore();
  } else {
    drawMaps(context, across, wide, high);
    Object.assign(plain.canvas, { width: canvas.width, height: canvas.height });
    plain.canvas.getContext("2d").drawImage(canvas, 0, 0);
    plain.key = key;
  }
  mark(context, across, wide, high);
  const last = network.start + network.maps.shape[0];
  $("page-words").textContent = `${network.start}–${last - 1} of ${network.shape[0]}`;
  $("page-back").disabled = network.start === 0;
  $("page-on").disabled = last >= network.shape[0];
}

function drawMaps(context, across, wide, high) {
  const [, rows, columns] = network.shape;
  const limit = largest(network.maps);
  const isFlat = rows * columns === 1;
  for (let i = 0; i < network.maps.shape[0]; i++) {
    const [x, y] = [(i % across) * (wide + 6), Math.floor(i / across) * (high + 6)];
    const map = network.maps.subarray(i * rows * columns, (i + 1) * rows * columns);
    put(context, signed(map, rows, columns, limit), x, y, wide, high);
    if (isFlat) label(context, i, map[0], x, y, wide, limit);
  }
}

function label(context, i, value, x, y, wide, limit) {
  const number = network.start + i;
  const isOutput = network.info.classes.length === network.shape[0] && state.mode === "RM0";
  const name = isOutput ? network.info.classes[number] : String(number);
  const strong = Math.abs(value) / limit > 0.55;
  context.fillStyle = strong ? "#fff" : colour("--ink");
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.fillText(name, x + 8, y + 16, wide - 14);
  context.fillText(short(value, 3), x + 8, y + 31, wide - 14);
}

function mark(context, across, wide, high) {
  const [count, rows, columns] = network.shape;
  const i = (count === 1 ? 0 : state.channel) - network.start;
  if (i < 0 || i >= network.maps.shape[0]) return;
  const [x, y] = [(i % across) * (wide + 6), Math.floor(i / across) * (high + 6)];
  context.strokeStyle = colour("--accent");
  context.lineWidth = 2;
  context.strokeRect(x + 1, y + 1, wide - 2, high - 2); // inside: a canvas cuts what is outside
  const isSum = state.mode === "RM1" || state.mode === "RM3";
  if (rows * columns === 1 || (isSum && !chosen().one)) return;
  const [w, h] = [wide / columns, high / rows];
  context.strokeStyle = colour("--field");
  if (isSum) return context.strokeRect(x + 1, y + state.row * h + 1, wide - 2, Math.max(2, h - 2));
  context.strokeRect(x + state.col * w - 1, y + state.row * h - 1, Math.max(4, w) + 2, Math.max(4, h) + 2);
}

/** The unit under a place on the canvas; null between tiles. */
export function unitAt(event) {
  if (!network.maps) return null;
  const box = $("tiles").getBoundingClientRect();
  const [count, rows, columns] = network.shape;
  const { across, wide, high } = layout(box.width, box.height, network.shape);
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const [i, k] = [Math.floor(x / (wide + 6)), Math.floor(y / (high + 6))];
  const [u, v] = [x - i * (wide + 6), y - k * (high + 6)];
  const tile = k * across + i;
  if (i >= across || u >= wide || v >= high || tile >= network.maps.shape[0]) return null;
  const place = { row: Math.floor((v / high) * rows), col: Math.floor((u / wide) * columns) };
  return { ...place, channel: count === 1 ? state.channel : network.start + tile };
}

/** The middle of a unit on the canvas, in the page's pixels; null if its tile is not shown. */
export function placeOf({ row, col, channel }) {
  const box = $("tiles").getBoundingClientRect();
  const [count, rows, columns] = network.shape;
  const { across, wide, high } = layout(box.width, box.height, network.shape);
  const i = (count === 1 ? 0 : channel) - network.start;
  if (i < 0 || i >= network.maps.shape[0]) return null;
  return {
    x: box.left + (i % across) * (wide + 6) + ((col + 0.5) * wide) / columns,
    y: box.top + Math.floor(i / across) * (high + 6) + ((row + 0.5) * high) / rows,
  };
}
