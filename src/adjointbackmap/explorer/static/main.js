// The page: reads the address, asks for what is seen, and follows pointer and keys.

import { alone, ask, file } from "./net.js";
import * as draw from "./draw.js";
import { around, connected, inNotebook, tell } from "./frame.js";
import { chosen, drawStrip, drawTiles, loadTiles, markLayer, network, placeOf, unitAt } from "./network.js";
import { modeFor, read, setUnit, state, write } from "./state.js";
import { loadOthers } from "./others.js";
import * as take from "./take.js";
import { drawReceipt, drawUnit, keepUnit, loadSums, loadUnit, makeSwitches, readPixel, unit } from "./unit.js";
import * as whatif from "./whatif.js";
import { check, offer, showKind } from "./words.js";

const $ = (id) => document.getElementById(id);
const THEME = "adjointbackmap-theme"; // name in the browser's storage
const WIDE = 1100; // pixels; a wider page fills its frame, as the style says
const HEIGHT = 800; // pixels of such a page in a notebook
let held = false; // whether the unit stays while the pointer moves
let start = null;

function say(error) {
  $("notice").hidden = !error;
  $("notice").textContent = error ? error.message ?? error : "";
}

/** Run something, and show what went wrong. */
async function attempt(work) {
  try {
    await work();
    say(null);
  } catch (error) {
    say(error);
  }
}

// what is chosen

function clamp() {
  const layer = chosen();
  const [count, rows, columns] = layer.tiles;
  state.mode = modeFor(layer, state.mode);
  state.row = Math.min(state.row, rows - 1);
  state.col = Math.min(state.col, columns - 1);
  state.channel = Math.min(state.channel, count - 1);
  state.j = Math.min(state.j, (layer.modes[state.mode].in_channel ?? 1) - 1);
}

function changedUnit() {
  clamp();
  drawTiles();
  whatif.drawPhoto();
  write(chosen());
  attempt(async () => {
    await loadUnit();
    if (whatif.edit.pixels) whatif.loadWhatif();
    if (held) whatif.renewTicks();
    if ($("others").open && !state.text) loadOthers();
  });
}

function chooseLayer(name, keep = false) {
  state.layer = name;
  const layer = chosen();
  if (!keep) {
    const [, rows, columns] = layer.tiles;
    Object.assign(state, { row: rows >> 1, col: columns >> 1, channel: 0 });
    if (layer.modes.RM0 && network.overview.predicted < layer.tiles[0]) state.channel = network.overview.predicted ?? 0;
  }
  if (!(state.mode in layer.modes)) state.mode = "";
  clamp();
  makeSwitches(changedSwitch);
  markLayer();
  attempt(loadTiles);
  changedUnit();
}

function changedSwitch(change) {
  Object.assign(state, change);
  if ("mode" in change) changedUnit();
  else {
    drawUnit();
    write(chosen());
  }
}

// networks and pictures

async function chooseNetwork(name) {
  $("prediction").textContent = "…";
  say(`Tracing ${name}…`);
  const info = await ask("network", { net: name });
  if (info) await choosePicture(seen[kindOf(info)], info);
}

const kindOf = (info) => (info.text ? "text" : "img");
const seen = { text: "", img: "" }; // the last sentence and the last picture

async function choosePicture(id, info = network.info) {
  const overview = await ask("overview", { net: info.name, img: id });
  if (overview === null) return;
  // all at once: the page may be drawn anew while an answer is awaited
  const kind = kindOf(info);
  if (state.text !== (kind === "text")) unit.answer = null; // it cannot be drawn as the other kind
  Object.assign(state, { net: info.name, img: id, text: kind === "text" });
  Object.assign(network, { info, overview });
  seen[kind] = id;
  if (state.text) readSentence();
  showKind();
  Object.assign(whatif.edit, { pixels: null, end: null });
  Object.assign(state, { way: "", t: 0, paint: "" });
  say(null);
  $("photo-words").textContent = overview.words;
  $("prediction").textContent = overview.prediction ?? `${network.info.shape.join(" × ")}`;
  drawScores();
  drawStrip((layer) => chooseLayer(layer));
  const names = network.info.layers.map((each) => each.name);
  const kernels = network.info.layers.filter((each) => "RM4" in each.modes);
  const last = names[names.length - 1];
  const middle = state.text ? last : (kernels[kernels.length >> 1] ?? network.info.layers[0]).name;
  const usual = names.includes(start.layer) ? start.layer : middle;
  const first = names.includes(state.layer) ? state.layer : usual;
  markPictures();
  chooseLayer(first, names.includes(state.layer));
  whatif.reset(); // the way and the strokes were those of another picture
}

function drawScores() {
  const scores = network.overview.arrays.scores;
  if (!scores) return $("scores").replaceChildren();
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]).slice(0, 5);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const last = network.info.layers[network.info.layers.length - 1];
  $("scores").replaceChildren(...order.map((n, i) => {
    const row = document.createElement("button");
    row.className = `score${i === 0 ? " best" : ""}`;
    row.innerHTML = `<span></span><i style="width:${(100 * (scores[n] - low)) / (high - low || 1)}%"></i><span>${draw.short(scores[n], 3)}</span>`;
    row.firstChild.textContent = network.info.classes[n] ?? n;
    row.title = "Show the hyperplane of this output";
    row.addEventListener("click", () => {
      chooseLayer(last.name, true);
      state.channel = n;
      held = true;
      showHeld();
      attempt(loadTiles);
      changedUnit();
    });
    return row;
  }));
}

/** The layers have as many rows as the sentence has words. */
function readSentence() {
  const { tiles } = network.overview;
  for (const layer of network.info.layers) layer.tiles = tiles[layer.name];
  $("sentence").value = state.img;
  if (!(state.view === "xH")) state.view = "H";
}

function chooseSentence(sentence) {
  attempt(() => {
    check(sentence, network.info.shape[1]);
    return choosePicture(sentence);
  });
}

let samples = null;

async function loadPictures() {
  const answer = await ask("samples");
  if (answer === null) return;
  samples = answer.arrays.samples;
  const [, channels, rows, columns] = samples.shape;
  const n = channels * rows * columns;
  $("pictures").replaceChildren(...answer.pictures.map(({ id, name }) => {
    const button = document.createElement("button");
    button.dataset.id = id;
    button.title = /^\d+$/.test(id) ? `${name}, sample image ${id}` : name;
    button.setAttribute("aria-label", button.title);
    if (/^\d+$/.test(id)) {
      const pixels = samples.subarray(id * n, (Number(id) + 1) * n);
      button.append(draw.small(draw.photo(pixels, channels, rows, columns)));
    } else button.textContent = name.slice(0, 12);
    button.addEventListener("click", () => attempt(() => choosePicture(id)));
    return button;
  }));
  markPictures();
}

function markPictures() {
  for (const each of $("pictures").children) {
    const shown = each.dataset.id === state.img;
    each.setAttribute("aria-pressed", shown);
    if (!shown || each.firstElementChild || !network.overview || state.text) continue;
    // a picture of one's own: the page has its pixels once it is shown
    each.replaceChildren(draw.small(draw.photo(network.overview.arrays.pixels, ...network.info.shape)));
  }
}

async function upload(picture) {
  if (!picture) return;
  if (state.text) throw new Error(`${state.net} reads sentences: choose a network of pictures first.`);
  if (picture.size > start.upload) throw new Error(`A picture must have at most ${start.upload >> 20} MiB.`);
  const answer = await ask("upload", { name: picture.name ?? "pasted" }, picture);
  if (answer === null) return;
  await choosePicture(answer.id);
  await loadPictures();
}

// pointer and keys

function showHeld() {
  $("pinned").hidden = !held;
}

function hover(event) {
  if (held && event.type === "pointermove") return;
  const found = unitAt(event);
  if (!found) return;
  const same = found.row === state.row && found.col === state.col && found.channel === state.channel;
  if (event.type === "pointerdown") {
    held = !(held && same);
    showHeld();
  }
  if (same) return;
  Object.assign(state, found);
  changedUnit();
}

const WALK = {
  ArrowUp: [-1, 0, 0], ArrowDown: [1, 0, 0], ArrowLeft: [0, -1, 0], ArrowRight: [0, 1, 0],
  PageUp: [0, 0, -1], PageDown: [0, 0, 1],
};

function walk(event) {
  if (event.key === "Enter" || event.key === " " || event.key === "Escape") {
    held = event.key === "Escape" ? false : !held;
    showHeld();
    event.preventDefault();
    return;
  }
  let step = WALK[event.key];
  if (!step) return;
  event.preventDefault();
  const [count, rows, columns] = chosen().tiles;
  if (rows * columns === 1) step = [0, 0, step[0] + step[1] + step[2]];
  state.row = Math.max(0, Math.min(rows - 1, state.row + step[0]));
  state.col = Math.max(0, Math.min(columns - 1, state.col + step[1]));
  state.channel = Math.max(0, Math.min(count - 1, state.channel + step[2]));
  if (step[2]) attempt(loadTiles);
  changedUnit();
}

function turnPage(by) {
  const last = chosen().tiles[0] - 1;
  state.channel = Math.max(0, Math.min(last, network.start + by * network.perPage));
  attempt(loadTiles);
  changedUnit();
}

function paintWith(event) {
  whatif.edit.brush = whatif.pixelAt(event);
  if (event.buttons && whatif.edit.tool) whatif.paint();
  else whatif.drawPhoto();
}

function brushKeys(event) {
  const step = WALK[event.key];
  if (step && !step[2]) {
    const [, rows, columns] = network.info.shape;
    const [r, c] = whatif.edit.brush;
    whatif.edit.brush = [
      Math.max(0, Math.min(rows - 1, r + step[0])), Math.max(0, Math.min(columns - 1, c + step[1])),
    ];
    if (!whatif.edit.tool) setTool("brush");
    whatif.drawPhoto();
  } else if (event.key === " " || event.key === "Enter") {
    if (!whatif.edit.tool) setTool("brush");
    whatif.paint();
    write(chosen());
  } else return;
  event.preventDefault();
}

function setTool(tool) {
  whatif.edit.tool = whatif.edit.tool === tool ? "" : tool;
  for (const name of ["brush", "erase"]) $(name).setAttribute("aria-pressed", whatif.edit.tool === name);
  whatif.drawPhoto();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  if (network.overview) redraw();
}

/** Change the theme, and keep it for the next time. */
function turnTheme() {
  setTheme(draw.isDark() ? "light" : "dark");
  try { localStorage.setItem(THEME, document.documentElement.dataset.theme); } catch { /* no storage */ }
}

/** The theme that the notebook, the address, the last time or the system says. */
function firstTheme() {
  let kept = null;
  try { kept = localStorage.getItem(THEME); } catch { /* no storage */ }
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  return around.theme ?? read().theme ?? kept ?? (isDark ? "dark" : "light");
}

function redraw() {
  drawStrip((layer) => chooseLayer(layer));
  markLayer();
  loadTiles().catch(say); // a notice stays: it may be why the page has another height
  whatif.drawPhoto();
  drawUnit();
  if (unit.answer) drawReceipt();
  whatif.loadWhatif();
}

function connect() {
  const on = (id, type, act) => $(id).addEventListener(type, act);
  on("net", "change", () => attempt(() => chooseNetwork($("net").value)));
  on("tiles", "pointermove", hover);
  on("tiles", "pointerdown", hover);
  on("tiles", "keydown", walk);
  on("page-back", "click", () => turnPage(-1));
  on("page-on", "click", () => turnPage(1));
  on("photo", "pointermove", paintWith);
  on("photo", "pointerdown", (event) => { $("photo").setPointerCapture(event.pointerId); paintWith(event); });
  on("photo", "pointerup", () => write(chosen())); // once: browsers bound how often it changes
  on("photo", "keydown", brushKeys);
  on("brush", "click", () => setTool("brush"));
  on("erase", "click", () => setTool("erase"));
  on("plane", "pointermove", readPixel);
  on("contrast", "input", () => changedSwitch({ contrast: Number($("contrast").value) }));
  on("zoom", "click", () => {
    $("zoom").setAttribute("aria-pressed", !state.zoom);
    changedSwitch({ zoom: !state.zoom });
  });
  on("keep", "click", keepUnit);
  on("j", "input", () => { state.j = Math.max(0, Number($("j").value) || 0); changedUnit(); });
  on("sums", "toggle", () => { if ($("sums").open) attempt(loadSums); });
  on("others", "toggle", () => { if ($("others").open) loadOthers(); });
  for (const way of ["kink", "boundary", "attack"]) {
    on(`to-${way}`, "click", () => attempt(async () => { await whatif.follow(way); write(chosen()); }));
  }
  on("slide", "input", () => { whatif.slideTo(Number($("slide").value) / 1000); write(chosen()); });
  on("reset", "click", () => { whatif.reset(); write(chosen()); });
  on("copy-link", "click", () => take.copy($("copy-link"), location.href));
  on("copy-python", "click", () => take.copy($("copy-python"), take.python()));
  on("save-png", "click", take.savePng);
  on("save-svg", "click", take.saveSvg);
  on("save-npz", "click", () => attempt(take.saveNpz));
  on("theme", "click", turnTheme);
  on("sentence-form", "submit", (event) => { event.preventDefault(); chooseSentence($("sentence").value); });
  on("sentence", "keydown", (event) => { // Enter reads; with Shift it is a new line
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    chooseSentence($("sentence").value);
  });
  on("file", "change", () => attempt(() => upload($("file").files[0])));
  addEventListener("paste", (event) => {
    const found = [...event.clipboardData.files][0];
    if (found) attempt(() => upload(found));
  });
  addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  addEventListener("dragleave", () => $("drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    attempt(() => upload(event.dataTransfer.files[0]));
  });
  addEventListener("hashchange", () => attempt(open));
  document.addEventListener("around", ({ detail }) => {
    if (detail.theme && detail.theme !== document.documentElement.dataset.theme) setTheme(detail.theme);
    if (inNotebook) attempt(open);
  });
  let later = 0;
  const watch = new ResizeObserver(() => {
    clearTimeout(later);
    later = setTimeout(() => { if (network.overview) redraw(); }, 60);
  });
  for (const id of ["tiles", "photo", "plane"]) watch.observe($(id));
  if (!inNotebook) return;
  const fit = () => tell({ height: innerWidth > WIDE ? HEIGHT : document.documentElement.offsetHeight });
  new ResizeObserver(fit).observe(document.body);
}

/** Show what the address says. */
async function open() {
  const given = read();
  const isNet = start.networks.includes(given.net);
  const net = isNet ? given.net : start.net;
  seen.img = given.img || seen.img || start.img;
  seen.text = given.text || seen.text || start.sentences?.[0] || "";
  if (given.layer) state.layer = given.layer;
  if (given.view) state.view = given.view;
  state.contrast = Number(given.contrast) || 0;
  state.zoom = given.zoom === "1";
  $("contrast").value = state.contrast;
  $("zoom").setAttribute("aria-pressed", state.zoom);
  $("net").value = net;
  say(`Tracing ${net}…`);
  const info = network.info?.name === net ? network.info : await ask("network", { net });
  const layer = info.layers.find((each) => each.name === given.layer);
  if (layer) {
    state.mode = modeFor(layer, given.mode);
    setUnit(layer, state.mode, (given.unit ?? "").split(",").map(Number));
    held = true;
    showHeld();
  }
  await choosePicture(seen[kindOf(info)], info);
  if (state.text) return;
  if (given.paint) whatif.paintAgain(given.paint);
  else if (given.way in { kink: 1, boundary: 1, attack: 1 }) await whatif.follow(given.way, Number(given.t) || 0);
}

async function boot() {
  await connected;
  setTheme(firstTheme());
  document.body.classList.toggle("inside", inNotebook);
  document.body.classList.toggle("framed", !inNotebook && window.parent !== window);
  connect();
  if (!alone()) say("Loading PyTorch…");
  start = await ask("start");
  offer(start.sentences ?? [], chooseSentence);
  network.shipped = start.networks.filter((name) => name !== start.net || /cifar/.test(name));
  $("net").replaceChildren(...start.networks.map((name) => new Option(name, name)));
  document.body.classList.toggle("alone", alone());
  await open();
  if (!alone()) await loadPictures();
  document.body.dataset.ready = "yes";
}

// for a script that measures
window.explorer = { state, network, unit, placeOf, chooseLayer, file };
attempt(boot);
