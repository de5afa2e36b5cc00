// What is around the page: nothing, a page that says light or dark, or a notebook whose kernel answers.

/** Whether the page is in a notebook. */
export const inNotebook = document.querySelector('meta[name="answers"]') !== null;

export const around = { view: "", theme: null };
let port = null;
let asked = 0;
const page = Math.random().toString(36).slice(2); // other views of the widget ask too
const waiting = new Map(); // number of a question -> what takes its answer

/** Resolves once the notebook has called; at once where there is none. */
export const connected = new Promise((done) => {
  if (!inNotebook) done();
  addEventListener("message", ({ data, ports }) => {
    if (!data?.explorer) return;
    Object.assign(around, data.explorer);
    if (inNotebook && ports[0]) {
      [port] = ports;
      port.onmessage = hear;
      done();
    } else change();
  });
});

function change() {
  document.dispatchEvent(new CustomEvent("around", { detail: around }));
}

function hear({ data }) {
  if (data.around) {
    Object.assign(around, data.around);
    change();
    return;
  }
  waiting.get(data.id)?.(data);
  waiting.delete(data.id);
}

/** Say something to the notebook: what is seen, or how high the page is. */
export function tell(message) {
  port?.postMessage(message);
}

/** An answer of the kernel: an error, JSON, bytes, or that the question was dropped. */
export async function askKernel(question, words, body) {
  await connected;
  const id = `${page}-${asked++}`;
  const given = Object.fromEntries(Object.entries(words).map(([name, word]) => [name, String(word)]));
  const bytes = body === null ? null : await new Blob([body]).arrayBuffer();
  const answer = new Promise((done) => waiting.set(id, done));
  port.postMessage({ id, question, words: given, bytes });
  return answer;
}
