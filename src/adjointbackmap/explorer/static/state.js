// What is seen, and the address that says it.

import { around, inNotebook, tell } from "./frame.js";

export const state = {
  net: "", img: "", layer: "", row: 0, col: 0, channel: 0, j: 0, mode: "",
  view: "H", contrast: 0, zoom: false, way: "", t: 0, paint: "",
  text: false, // whether img is a sentence
};

/** The numbers of the unit in the chosen mode, as the server takes them. */
export function unitNumbers(layer, mode = state.mode) {
  const { row, col, channel, j } = state;
  const names = Object.keys(layer.modes[mode]);
  const places = {
    out_row: row, out_col: col, in_channel: j, out_channel: layer.one ? row : channel,
    out_position_0: row, out_feature: mode === "RM0" ? channel : col,
  };
  return names.map((name) => places[name]);
}

/** Put the numbers of a unit into the state. */
export function setUnit(layer, mode, numbers) {
  Object.keys(layer.modes[mode]).forEach((name, i) => {
    const n = numbers[i];
    if (!Number.isInteger(n)) return;
    if (name === "out_row" || name === "out_position_0") state.row = n;
    else if (name === "out_col") state.col = n;
    else if (name === "in_channel") state.j = n;
    else if (name === "out_channel" && layer.one) state.row = n; // its one tile has a row for each
    else if (name === "out_channel" || mode === "RM0") state.channel = n;
    else state.col = n;
  });
}

/** The mode that a layer is shown in: the chosen one, or the unit's own. */
export function modeFor(layer, wanted) {
  if (wanted in layer.modes) return wanted;
  return "RM2" in layer.modes ? "RM2" : Object.keys(layer.modes)[0];
}

/** Read the address. */
export function read() {
  const address = inNotebook ? around.view : location.hash;
  return Object.fromEntries(new URLSearchParams(address.replace(/^#/, "")));
}

/** Write the address; the browser's history keeps one entry. A notebook has it in the widget. */
export function write(layer) {
  const words = new URLSearchParams({
    net: state.net, [state.text ? "text" : "img"]: state.img, layer: state.layer,
    unit: unitNumbers(layer).join(","), mode: state.mode, view: state.view,
  });
  if (state.contrast) words.set("contrast", state.contrast);
  if (state.zoom) words.set("zoom", "1");
  if (state.paint) words.set("paint", state.paint);
  if (state.way) { words.set("way", state.way); words.set("t", state.t); }
  const address = `#${words}`.replaceAll("%2C", ",");
  if (inNotebook) tell({ view: address });
  else history.replaceState(null, "", address);
}
