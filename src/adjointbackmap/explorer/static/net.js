// Questions to the server, and answers made of a JSON head and arrays of float32.

const tab = Math.random().toString(36).slice(2);
const prepared = new Map(); // answers that a page without a server brings along

/** Answers that need no server: an address relative to the page -> its content. */
export function prepare(answers) {
  for (const [address, content] of answers) prepared.set(address, content);
}

/** Whether the page has no server. */
export const alone = () => prepared.size > 0;

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  let start = 4 + length;
  for (const { name, shape } of head.arrays) {
    const count = shape.reduce((a, b) => a * b, 1);
    const data = new Float32Array(buffer, start, count);
    arrays[name] = Object.assign(data, { shape });
    start += 4 * count;
  }
  return { ...head, ...{ arrays } };
}

/** An answer; null if the server dropped the question, because a newer one came. */
export async function ask(question, words = {}, body = null) {
  const panel = words.panel ?? question;
  const { panel: _, ...rest } = words;
  const address = `api/${question}?${new URLSearchParams(rest)}`;
  if (alone()) {
    const found = prepared.get(address);
    if (found === undefined) throw new Error("This page has no answer to that: open the explorer itself.");
    return found instanceof ArrayBuffer ? unpack(found) : found;
  }
  const options = body === null ? {} : { method: "POST", body };
  const answer = await fetch(`${address}&channel=${tab}-${panel}`, options);
  if (answer.status === 204) return null;
  if (answer.headers.get("content-type")?.startsWith("application/json")) {
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }
  if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
  return unpack(await answer.arrayBuffer());
}

/** A file from the server. */
export async function file(question, words) {
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
