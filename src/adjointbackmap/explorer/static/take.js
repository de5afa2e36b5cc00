// What one can take away: lines of Python, pictures and numbers.

import * as draw from "./draw.js";
import { file } from "./net.js";
import { chosen, network } from "./network.js";
import { state, unitNumbers } from "./state.js";
import { unit } from "./unit.js";

const $ = (id) => document.getElementById(id);

/** Lines of Python that compute what is seen. */
export function python() {
  if (state.text) return pythonOfSentence();
  const isSample = /^\d+$/.test(state.img);
  const isShipped = network.shipped.includes(state.net);
  const model = isShipped ? `abm.models.load("${state.net}")` : `...  # ${state.net}`;
  const picture = isSample ? `abm.data.sample().pixels[${state.img}]` : `"${network.overview.words.split(" (")[0]}"`;
  const { size } = network.info.wanted;
  const { mean, std } = network.info;
  const given = isSample ? "" : `, size=(${size})`;
  const list = (numbers) => (numbers.length > 1 ? `(${numbers.join(", ")})` : numbers[0]);
  const normalised = mean.some((v) => v) || std.some((v) => v !== 1) ? `, mean=${list(mean)}, std=${list(std)}` : "";
  const curved = network.info.curved && `, curved="${network.info.curved}"`;
  const numbers = unitNumbers(chosen());
  const tuple = `(${numbers.join(", ")}${numbers.length === 1 ? "," : ""})`;
  const views = { xH: "contributions", channels: "channels", spectrum: "spectrum" };
  return [
    "import adjointbackmap as abm",
    "",
    `model = ${model}`,
    `x = abm.image(${picture}${given}${normalised})`,
    `network = abm.trace(model, x.detach()${curved})`,
    `planes = abm.hyperplanes(network, x.detach(), "${state.layer}", "${state.mode}", units=${tuple})`,
    "print(planes.receipt())",
    `abm.plots.save(planes.plot(x, "${views[state.view] ?? "hyperplane"}"), "unit.png")`,
    "",
  ].join("\n");
}

function pythonOfSentence() {
  const numbers = unitNumbers(chosen());
  const curved = network.info.curved === "tangent" ? ', "tangent"' : "";
  return [
    "import adjointbackmap as abm",
    "",
    `reader = abm.models.reader("${state.net}"${curved})`,
    `x = reader.embed(${JSON.stringify(state.img)})`,
    `planes = abm.hyperplanes(reader.network, x, "${state.layer}", "${state.mode}", units=(${numbers.join(", ")},), dtype="float64")`,
    "print(planes.contributions().image.sum(-1))  # what each word adds; then zeros",
    "print(planes.receipt())",
    "",
  ].join("\n");
}

/** Put text on the clipboard, and say so on the button. */
export async function copy(button, text) {
  const words = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    window.prompt("Copy this:", text);
  }
  setTimeout(() => { button.textContent = words; }, 1200);
}

function save(blob, ending) {
  const name = [state.net, state.layer, unitNumbers(chosen()).join("-"), state.mode].join("-");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** The picture of the hyperplane as PNG. */
export function savePng() {
  $("plane").toBlob((blob) => save(blob, "png"));
}

const escape = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

/** The picture and the receipt as SVG. */
export function svg() {
  const { answer } = unit;
  const lines = [[state.text ? "words" : "pixels", answer.pixels], ...answer.biases.map(({ name, adds }) => [name, adds])];
  let sum = 0;
  const ends = lines.map(([, adds]) => [sum, (sum += adds)]);
  const all = [0, ...ends.flat()];
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const at = (v) => 480 + (220 * (v - low)) / (high - low || 1);
  const rows = lines.map(([name, adds], i) => {
    const [a, b] = [Math.min(...ends[i]), Math.max(...ends[i])];
    const y = 60 + 18 * i;
    return `<text x="400" y="${y + 9}">${escape(name)}</text>`
      + `<rect x="${at(a)}" y="${y}" width="${Math.max(1, at(b) - at(a))}" height="11" fill="${adds >= 0 ? "#b2182b" : "#2166ac"}"/>`
      + `<text x="712" y="${y + 9}">${draw.withSign(adds, 4)}</text>`;
  });
  const y = 78 + 18 * lines.length;
  const { note } = network.info;
  const said = note ? `<text x="400" y="${y + 18}">${note}</text>` : "";
  const height = Math.max(400, y + (note ? 38 : 20));
  const canvas = $("plane");
  const tall = (360 * canvas.height) / canvas.width;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="800" height="${height}" font-family="sans-serif" font-size="11">`
    + `<rect width="100%" height="100%" fill="#fff"/><text x="20" y="28" font-size="14">${escape($("unit").textContent)} (${state.mode})</text>`
    + `<image x="20" y="44" width="360" height="${tall}" href="${canvas.toDataURL()}"/>${rows.join("")}`
    + `<text x="400" y="${y}">sum ${draw.short(answer.sum, 7)}, model ${draw.short(answer.value, 7)}</text>${said}</svg>`;
}

/** Save the picture and the receipt. */
export function saveSvg() {
  save(new Blob([svg()], { type: "image/svg+xml" }), "svg");
}

/** Save the numbers. */
export async function saveNpz() {
  const words = {
    net: state.net, img: state.img, layer: state.layer,
    unit: unitNumbers(chosen()).join(","), mode: state.mode,
  };
  save(await file("npz", words), "npz");
}
