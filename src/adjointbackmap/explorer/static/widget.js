// The explorer in a notebook: the page in a frame, which asks the kernel through the widget's messages.

const HEIGHT = 800; // pixels, until the page says its own
const LATER = 300; // milliseconds; the pointer moves faster than the kernel must know the view

/** Whether the notebook is dark, from the first background around an element. */
function isDark(element) {
  for (let each = element; each; each = each.parentElement) {
    const found = getComputedStyle(each).backgroundColor.match(/[\d.]+/g)?.map(Number);
    if (found && found[3] !== 0) return found[0] + found[1] + found[2] < 3 * 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The bytes behind a view of them, as a buffer of their own. */
const copied = ({ buffer, byteOffset, byteLength }) => buffer.slice(byteOffset, byteOffset + byteLength);

function render({ model, el }) {
  const frame = document.createElement("iframe");
  Object.assign(frame, { title: "adjointbackmap explorer", srcdoc: model.get("_page") });
  frame.allow = "clipboard-write";
  frame.style.cssText = `display: block; width: 100%; height: ${HEIGHT}px; border: 0; border-radius: 8px`;
  let port = null;
  let later = 0;
  let seen = model.get("view");

  const hear = ({ data: { id, question, words, bytes, view, height } }) => {
    if (question) model.send({ id, question, words }, undefined, bytes ? [bytes] : []);
    if (height) frame.style.height = `${height}px`;
    if (view === undefined) return;
    seen = view;
    clearTimeout(later);
    later = setTimeout(() => {
      model.set("view", view);
      model.save_changes();
    }, LATER);
  };
  const answered = (content, buffers) => {
    port?.postMessage({ ...content, bytes: buffers?.length ? copied(buffers[0]) : null });
  };
  const moved = () => {
    if (model.get("view") === seen) return;
    seen = model.get("view");
    port?.postMessage({ around: { view: seen } });
  };

  // a frame that is moved in its document is loaded again
  frame.addEventListener("load", () => {
    const { port1, port2 } = new MessageChannel();
    port = port1;
    port.onmessage = hear;
    const around = { view: seen, theme: isDark(el) ? "dark" : "light" };
    frame.contentWindow.postMessage({ explorer: around }, "*", [port2]);
  });
  model.on("msg:custom", answered);
  model.on("change:view", moved);
  el.append(frame);
  return () => {
    clearTimeout(later);
    model.off("msg:custom", answered);
    model.off("change:view", moved);
  };
}

export default { render };
