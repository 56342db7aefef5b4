// What can be selected: image, layer, head, arrangement, colours, mask, and how two runs are compared.
import { changeDetector, el } from "./elements.js";
import { percent, range } from "./numbers.js";
import { hasColours, hasFeatures, hasQueries } from "./tile.js";
import {
  change,
  headName,
  layersOf,
  pictureCount,
  rolesOf,
  runA,
  runB,
  showImage,
  shownImage,
  shownIndex,
  shownLayer,
  shownLayers,
  shownPicture,
  showPicture,
  view,
} from "./view.js";

/** @typedef {{element: HTMLElement, draw: () => void}} Control */

const always = () => true;

export function makeThumbnails() {
  const element = el("div", { class: "thumbnails", role: "group", "aria-label": "images" });
  const runChanged = changeDetector();

  /** @param {number} image */
  function thumbnail(image) {
    const middle = pictureCount() > 1 ? Math.floor(pictureCount() / 2) + 1 : 0; // a frame is clearer than their mean
    const { name, photo } = runA().images[image * pictureCount() + middle];
    const onclick = () => {
      change({ all: false });
      showImage(image);
    };
    const attributes = { type: "button", class: "thumbnail", title: name, "aria-label": name, onclick };
    return el("button", attributes, el("img", { src: photo, alt: "", draggable: "false" }));
  }

  function draw() {
    const { images } = runA();
    if (runChanged(images)) {
      const onclick = () => change({ all: !view.all });
      const all = el("button", { type: "button", class: "thumbnail every", onclick }, "All");
      const count = images.length / pictureCount();
      element.replaceChildren(all, ...range(count).map(thumbnail));
      element.hidden = count === 1;
    }
    [...element.children].forEach((button, i) => {
      button.ariaPressed = String(i ? !view.all && shownImage() === i - 1 : view.all);
    });
  }
  return { element, draw };
}

export function makeControls() {
  const twoRuns = () => Boolean(runB());
  const share = { min: 0, max: 1, step: 0.01 };
  const switches = el("div", { class: "switches" });
  const toggles = [
    toggle("Mask outline", "mask"),
    toggle("Ground truth", "truth", () => runA().truths.some((truths) => truths.length)),
  ];
  switches.append(...toggles.map((part) => part.element));
  const parts = [
    choice("Compare", "compare", { side: "A and B", swipe: "Swipe", difference: "B − A" }, twoRuns),
    slider("Swipe", "swipe", share, () => twoRuns() && view.compare === "swipe"),
    pictureSlider(),
    layerSlider(),
    headMenu(),
    choice(
      "Show",
      "show",
      { attention: "Attention", patch: "Patch", colors: "PCA", cosine: "Cosine" },
      () => hasColours() || hasFeatures() || hasQueries(),
      { patch: hasQueries, colors: hasColours, cosine: hasFeatures },
    ),
    choice("Arrange", "arrange", { focus: "Both", grid: "Heads", single: "Large" }),
    choice("Sort heads", "sort", { index: "By number", entropy: "By entropy" }),
    choice("Scale", "scale", { uniform: "× uniform", minmax: "Per map" }),
    choice("Colours", "table", { inferno: "Inferno", viridis: "Viridis" }),
    slider("Overlay", "opacity", share),
    slider("Mask mass", "threshold", { ...share, min: 0.05 }),
    { element: switches, draw: () => toggles.forEach((part) => part.draw()) },
  ];
  const elements = parts.map((part) => part.element);
  const element = el("section", { class: "card controls", "aria-label": "view" }, ...elements);
  return { element, draw: () => parts.forEach((part) => part.draw()) };
}

/**
 * A group of buttons, one for each value.
 * @param {string} label
 * @param {"compare" | "show" | "arrange" | "sort" | "scale" | "table"} key of the view
 * @param {Record<string, string>} options labels by value
 * @param {() => boolean} available whether there is a choice
 * @param {Record<string, () => boolean>} conditions of values
 * @returns {Control}
 */
function choice(label, key, options, available = always, conditions = {}) {
  const buttons = Object.entries(options).map(([value, text]) =>
    el("button", { type: "button", "data-value": value, onclick: () => change({ [key]: value }) }, text),
  );
  const segments = el("span", { class: "segments" }, ...buttons);
  const name = el("span", { class: "name" }, label);
  const element = el("div", { class: "control choice", role: "group", "aria-label": label }, name, segments);
  function draw() {
    element.hidden = !available();
    for (const button of buttons) {
      const value = String(button.dataset.value);
      button.ariaPressed = String(view[key] === value);
      button.hidden = !(conditions[value] ?? always)();
    }
  }
  return { element, draw };
}

/**
 * @param {string} label
 * @param {"swipe" | "opacity" | "threshold"} key of the view
 * @param {{min: number, max: number, step: number}} range
 * @param {() => boolean} available
 * @returns {Control}
 */
function slider(label, key, range, available = always) {
  const output = el("output", { for: key });
  const input = el("input", { id: key, type: "range", ...range });
  input.addEventListener("input", () => change({ [key]: Number(input.value) }));
  const element = el("div", { class: "control" }, el("label", { class: "name", for: key }, label), input, output);
  function draw() {
    element.hidden = !available();
    input.value = String(view[key]);
    output.textContent = percent(view[key]);
    fillTrack(input);
  }
  return { element, draw };
}

/** @param {HTMLInputElement} input */
function fillTrack({ style, min, max, value }) {
  style.setProperty("--filled", `${(100 * (Number(value) - Number(min))) / (Number(max) - Number(min) || 1)}%`);
}

/**
 * @param {string} label
 * @param {"mask" | "truth"} key of the view
 * @param {() => boolean} available
 * @returns {Control}
 */
function toggle(label, key, available = always) {
  const input = el("input", { type: "checkbox", onchange: () => change({ [key]: input.checked }) });
  const element = el("label", { class: "switch" }, input, label);
  function draw() {
    element.hidden = !available();
    input.checked = view[key];
  }
  return { element, draw };
}

/**
 * A slider over the frames of a clip or the slices of a volume, behind their mean and maximum.
 * @returns {Control}
 */
function pictureSlider() {
  const name = el("label", { class: "name", for: "picture" });
  const output = el("output", { for: "picture" });
  const input = el("input", { id: "picture", type: "range", min: 0, step: 1 });
  input.addEventListener("input", () => showPicture(Number(input.value)));
  const element = el("div", { class: "control" }, name, input, output);
  function draw() {
    const { pictures } = runA().facts;
    element.hidden = pictures.length === 0;
    if (element.hidden) return;
    const word = pictures[pictures.length - 1].split(" ")[0].replace(/s$/, "");
    name.textContent = word[0].toUpperCase() + word.slice(1);
    input.max = String(pictures.length - 1);
    input.value = String(shownPicture());
    output.textContent = input.ariaValueText = pictures[shownPicture()];
    fillTrack(input);
  }
  return { element, draw };
}

/**
 * A slider over the layers that were recorded, which need not be all layers of the model.
 * @returns {Control}
 */
function layerSlider() {
  const output = el("output", { for: "layer" });
  const input = el("input", { id: "layer", type: "range", min: 0, step: 1 });
  input.addEventListener("input", () => change({ layer: layersOf(runA())[Number(input.value)] }));
  const element = el("div", { class: "control" }, el("label", { class: "name", for: "layer" }, "Layer"), input, output);
  function draw() {
    const run = runA();
    const layers = layersOf(run);
    const layer = shownLayer();
    const roles = rolesOf(run);
    const having = roles.filter((role) => run.layer(shownIndex(run), role, layer));
    const text = having.length < roles.length ? `${layer} of ${having.join(" and ")}` : String(layer);
    const alone = layers.length === 1;
    input.max = String(layers.length - 1);
    input.value = String(layers.indexOf(layer));
    input.hidden = alone;
    input.ariaValueText = `layer ${text}`;
    output.textContent = alone ? `only layer ${layer} was recorded` : text;
    element.classList.toggle("alone", alone);
    fillTrack(input);
  }
  return { element, draw };
}

/** @returns {Control} */
function headMenu() {
  const select = el("select", { id: "head", onchange: () => change({ head: Number(select.value) }) });
  const element = el("div", { class: "control" }, el("label", { class: "name", for: "head" }, "Head"), select);
  function draw() {
    const heads = Math.max(0, ...shownLayers().map((layer) => layer.heads));
    if (view.head >= heads) view.head = -1;
    if (select.options.length !== heads + 1) {
      const options = range(heads + 1).map((i) => el("option", { value: i - 1 }, headName(i - 1)));
      select.replaceChildren(...options);
    }
    select.value = String(view.head);
  }
  return { element, draw };
}
