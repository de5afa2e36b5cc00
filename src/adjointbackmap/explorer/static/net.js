// Questions to the server or the kernel, and answers made of a JSON head and arrays of float32.

import { askKernel, inNotebook } from "./frame.js";

const tab = Math.random().toString(36).slice(2);
let prepared = null; // in a page without a server: an address -> where its answer lies
let content = null;

/** Whether the page has no server: its answers lie in the page itself. */
export const alone = () => document.getElementById("answers") !== null;

async function open() {
  if (prepared) return;
  const text = document.getElementById("answers").textContent;
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  content = buffer.slice(4 + length);
  prepared = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
}

/** An answer that lies in the page. */
async function prepare(question, words) {
  await open();
  if (question === "maps") return partOf(lying("maps " + words.layer), Number(words.start), Number(words.count));
  return lying(`api/${question}?${new URLSearchParams(words)}`);
}

function lying(address) {
  const place = prepared[address];
  if (!place) throw new Error("This page has no answer to that. The explorer itself has: adjointbackmap explore.");
  return unpack(content.slice(...place));
}

/** Some tiles of all. */
function partOf(answer, start, count) {
  const { maps } = answer.arrays;
  const [tiles, rows, columns] = maps.shape;
  const stop = Math.min(tiles, start + count);
  const part = maps.slice(start * rows * columns, stop * rows * columns);
  return { start, of: tiles, arrays: { maps: Object.assign(part, { shape: [stop - start, rows, columns] }) } };
}

/** Numbers of float16, as float32. */
function halves(buffer, start, count) {
  const bits = new Uint16Array(buffer, start, count);
  return Float32Array.from(bits, (b) => {
    const [exponent, share] = [(b >> 10) & 31, b & 1023];
    const size = exponent ? 2 ** (exponent - 15) * (1 + share / 1024) : 2 ** -24 * share;
    return b & 32768 ? -size : size;
  });
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  let start = 4 + length;
  for (const { name, shape } of head.arrays) {
    const count = shape.reduce((a, b) => a * b, 1);
    const data = head.half ? halves(buffer, start, count) : new Float32Array(buffer, start, count);
    arrays[name] = Object.assign(data, { shape });
    start += (head.half ? 2 : 4) * count;
  }
  return { ...head, ...{ arrays } };
}

/** An answer; null if the server dropped the question, because a newer one came. */
export async function ask(question, words = {}, body = null) {
  const panel = words.panel ?? question;
  const { panel: _, ...rest } = words;
  if (alone()) return prepare(question, rest);
  const asked = { ...rest, channel: `${tab}-${panel}` };
  if (inNotebook) return heard(await askKernel(question, asked, body));
  const options = body === null ? {} : { method: "POST", body };
  const answer = await fetch(`api/${question}?${new URLSearchParams(asked)}`, options).catch(() => {
    throw new Error("The command that made this page has ended. Its terminal says why.");
  });
  if (answer.status === 204) return null;
  if (answer.headers.get("content-type")?.startsWith("application/json")) {
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }
  if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
  return unpack(await answer.arrayBuffer());
}

/** What the kernel answered. */
function heard({ error, json, bytes, dropped }) {
  if (error) throw new Error(error);
  if (dropped) return null;
  return json ?? unpack(bytes);
}

/** A file from the server or the kernel. */
export async function file(question, words) {
  if (inNotebook) {
    const { error, bytes } = await askKernel(question, words, null);
    if (error) throw new Error(error);
    return new Blob([bytes]);
  }
  const answer = await fetch(`api/${question}?${new URLSearchParams(words)}`);
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer.blob();
}

/** A function that runs one call at a time; of the calls that come meanwhile, only the last. */
export function newest(work) {
  let running = false;
  let waiting = null;
  return async function run(...given) {
    if (running) {
      waiting = given;
      return;
    }
    running = true;
    try {
      await work(...given);
    } finally {
      running = false;
      if (waiting !== null) {
        const next = waiting;
        waiting = null;
        run(...next);
      }
    }
  };
}
