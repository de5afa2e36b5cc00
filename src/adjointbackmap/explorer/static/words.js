// A network that reads sentences: the sentence, and its words coloured by what they add.

import * as draw from "./draw.js";
import { network } from "./network.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);
// As the package splits a sentence.
const TOKEN = /[\p{L}\p{N}_]+(?=n't)|n't|'[\p{L}\p{N}_]+|[\p{L}\p{N}_]+|[^\p{L}\p{N}_\s]/gu;
const MARGIN = 84; // pixels for the words beside the map

/** Throw if a sentence has no word, or too many: the server would refuse it. */
export function check(sentence, most) {
  const count = sentence.match(TOKEN)?.length ?? 0;
  if (count === 0) throw new Error("A sentence must have a word or a punctuation mark. Got none: write one.");
  if (count > most) throw new Error(`A sentence must have at most ${most} words and punctuation marks. Got ${count}: take some away.`);
}

/** A number of a unit in words: a position is the word that is there. */
export function nameOf(layer, name, n) {
  if (name === "in_channel") return `in-channel ${n}`;
  if (name === "out_feature" && layer.shape.length === 1) return `unit ${n}`;
  const isRow = name === "out_channel" || name === "out_position_0";
  const ofWords = layer.shape[0] === network.info.shape[1]; // its rows are the words
  if (isRow && ofWords) return `word ${n} \u201c${network.overview.tokens[n]?.word ?? "padding"}\u201d`;
  if (isRow) return `channel ${n}`;
  return ofWords ? `unit ${n}` : `position ${n}`;
}

/** Draw the coloured words, and the map of words and their numbers. */
export function drawWords(answer, drawScale) {
  const most = draw.largest(answer.words.map(({ adds }) => adds));
  $("sentence-words").replaceChildren(...answer.words.map(({ word, adds }, i) => {
    const shown = document.createElement("span");
    shown.className = `word${network.overview.tokens[i]?.unknown ? " unknown" : ""}`;
    shown.dataset.testid = "word";
    shown.dataset.adds = adds;
    const share = Math.round(70 * Math.abs(adds) / most);
    shown.style.background = `color-mix(in srgb, var(--${adds > 0 ? "raises" : "lowers"}) ${share}%, transparent)`;
    if (share > 45) shown.style.color = draw.isDark() ? "#111" : "#fff";
    shown.append(word, Object.assign(document.createElement("small"), { textContent: draw.withSign(adds, 3) }));
    if (shown.classList.contains("unknown")) shown.title = "The network does not know this word.";
    return shown;
  }));
  const map = state.view === "xH" ? answer.arrays.xH : answer.arrays.H;
  const [rows, columns] = map.shape;
  const limit = draw.limitOf(map) / 40 ** (state.contrast / 100);
  const { context, width, height } = draw.fitted($("plane"));
  draw.put(context, draw.signed(map, rows, columns, limit), MARGIN, 0, width - MARGIN, height);
  const high = height / rows;
  context.font = `${Math.min(12, Math.max(6, high - 1))}px system-ui, sans-serif`;
  context.fillStyle = draw.colour("--ink");
  context.textAlign = "right";
  context.textBaseline = "middle";
  answer.words.forEach(({ word }, i) => context.fillText(word, MARGIN - 6, (i + 0.5) * high, MARGIN - 8));
  context.textAlign = "left";
  drawScale({ limit });
  $("readout").textContent = state.view === "xH"
    ? "Each row is a word: what each number of its embedding adds."
    : "Each row is a word: H for each number of its embedding.";
}

/** Show what belongs to sentences, or what belongs to pictures. */
export function showKind() {
  document.body.classList.toggle("reads", state.text);
  const pairs = state.text ? ["words", "words"] : ["pixels", "image"];
  $("receipt-kind").textContent = `${pairs[0]} + biases = value`;
  if (!state.text) $("readout").textContent = "";
  $("plane").setAttribute("aria-label", state.text ? "The hyperplane of the unit: a row for each word" : "The hyperplane of the unit");
}

/** The sentences that are offered, as buttons. */
export function offer(sentences, choose) {
  $("sentences").replaceChildren(...sentences.map((sentence) => {
    const button = document.createElement("button");
    button.textContent = sentence;
    button.addEventListener("click", () => choose(sentence));
    return button;
  }));
}
