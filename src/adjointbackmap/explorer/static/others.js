// Captum's attributions of the unit beside its hyperplane, and how far each is from the value.

import { ask, newest } from "./net.js";
import * as draw from "./draw.js";
import { chosen, network } from "./network.js";
import { state, unitNumbers } from "./state.js";

const $ = (id) => document.getElementById(id);

/** Ask for the attributions, and draw them. */
export const loadOthers = newest(async () => {
  $("others-body").innerHTML = `<p class="words">computing…</p>`;
  const words = {
    net: state.net, img: state.img, layer: state.layer,
    unit: unitNumbers(chosen()).join(","), mode: state.mode,
  };
  try {
    const answer = await ask("others", words);
    if (answer !== null) show(answer);
  } catch (error) {
    $("others-body").innerHTML = `<p class="words"></p>`;
    $("others-body").firstChild.textContent = error.message;
  }
});

function show({ methods, value, steps, arrays }) {
  const [channels, rows, columns] = network.info.shape;
  const table = document.createElement("div");
  table.className = "others";
  table.append(...methods.map(({ name, sum, off }) => {
    const figure = document.createElement("figure");
    const map = draw.summed(arrays[name], channels, rows * columns);
    const words = document.createElement("figcaption");
    words.innerHTML = "<b></b><span></span><span></span>";
    words.children[0].textContent = name;
    words.children[1].textContent = `sums to ${draw.short(sum, 4)}`;
    words.children[2].textContent = `off by ${draw.withSign(off, 2)}`;
    words.children[2].dataset.off = off;
    figure.append(draw.small(draw.signed(map, rows, columns, draw.limitOf(map))), words);
    return figure;
  }));
  const words = document.createElement("p");
  words.className = "words";
  words.textContent = `The unit's value is ${draw.short(value, 5)}. Each picture is a method's attribution, `
    + `summed over channels. Integrated gradients go from zeros to the image in ${steps} steps.`;
  $("others-body").replaceChildren(table, words);
}
