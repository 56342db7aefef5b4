// What can be chosen: images, layer, head, arrangement, colours, mask, and how two runs are compared.
import {el, hasColours, hasFeatures, headName} from "./tiles.js";
import {percent} from "./numbers.js";
import {atOf, change, layersOf, rolesOf, runA, runB, shownLayer, view} from "./view.js";

export function makeThumbnails() {
  const list = el("div", {class: "thumbnails", role: "group", "aria-label": "images"});
  let built = "";
  function draw() {
    const run = runA();
    if (built !== run.probe + run.name) {
      built = run.probe + run.name;
      const all = el("button", {type: "button", class: "thumbnail every", onclick: () => change({all: !view.all})}, el("span", {}, "All"));
      list.replaceChildren(all, ...run.images.map((image, i) => el("button", {
        type: "button", class: "thumbnail", title: image.name, "aria-label": image.name, onclick: () => change({image: i, all: false}),
      }, el("img", {src: image.photo, alt: "", draggable: "false"}))));
      list.hidden = run.images.length === 1;
    }
    [...list.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i ? !view.all && view.image === i - 1 : view.all)));
  }
  return {element: list, draw};
}

export function makeControls() {
  const parts = [
    choice("Compare", "compare", [["side", "A and B"], ["swipe", "Swipe"], ["difference", "B − A"]], () => Boolean(runB())),
    slider("Swipe", "swipe", {min: 0, max: 1, step: 0.01}, percent, () => Boolean(runB()) && view.compare === "swipe"),
    layers(), heads(),
    choice("Show", "show", [["attention", "Attention"], ["colors", "PCA"], ["cosine", "Cosine"]], () => hasColours() || hasFeatures(),
      value => value === "colors" ? hasColours() : value === "cosine" ? hasFeatures() : true),
    choice("Arrange", "arrange", [["focus", "Focus"], ["grid", "Heads"], ["single", "One large"]]),
    choice("Order", "sort", [["index", "By number"], ["entropy", "By entropy"]]),
    choice("Colours", "scale", [["uniform", "× uniform"], ["minmax", "Per map"]]),
    choice("Palette", "table", [["inferno", "Inferno"], ["viridis", "Viridis"]]),
    slider("Overlay", "opacity", {min: 0, max: 1, step: 0.01}, percent),
    slider("Mask holds", "threshold", {min: 0.05, max: 1, step: 0.01}, percent),
    el("div", {class: "switches"}, toggle("Mask outline", "mask"), toggle("Ground truth", "truth", () => runA().truths.some(t => t.length))),
  ];
  const elements = parts.map(part => part.element ?? part);
  const element = el("section", {class: "card controls", "aria-label": "view"}, ...elements);
  return {element, draw: () => drawers.forEach(draw => draw())};
}

const drawers = [];

// One of a few: a group of buttons.
function choice(label, key, options, there = () => true, possible = () => true) {
  const buttons = options.map(([value, text]) => el("button", {type: "button", "data-value": value, onclick: () => change({[key]: value})}, text));
  const element = el("div", {class: "control choice", role: "group", "aria-label": label}, el("span", {class: "name"}, label), el("span", {class: "segments"}, ...buttons));
  drawers.push(() => {
    element.hidden = !there();
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(view[key] === options[i][0]));
      button.hidden = !possible(options[i][0]);
    });
  });
  return element;
}

let names = 0;

function slider(label, key, range, written, there = () => true) {
  const id = `slider${names++}`, told = el("output", {for: id});
  const input = el("input", {id, type: "range", ...range, oninput: () => change({[key]: Number(input.value)})});
  const element = el("div", {class: "control"}, el("label", {class: "name", for: id}, label), input, told);
  drawers.push(() => {
    element.hidden = !there();
    input.value = view[key];
    told.textContent = written(view[key]);
    fillTrack(input);
  });
  return element;
}

const fillTrack = input => input.style.setProperty("--filled", `${100 * (input.value - input.min) / (input.max - input.min || 1)}%`);

function toggle(label, key, there = () => true) {
  const input = el("input", {type: "checkbox", onchange: () => change({[key]: input.checked})});
  const element = el("label", {class: "switch"}, input, label);
  drawers.push(() => {
    element.hidden = !there();
    input.checked = view[key];
  });
  return element;
}

// A slider over the layers that were recorded, not over all that the model has.
function layers() {
  const told = el("output", {for: "layer"});
  const input = el("input", {id: "layer", type: "range", min: 0, step: 1, oninput: () => change({layer: layersOf(runA())[Number(input.value)]})});
  const element = el("div", {class: "control"}, el("label", {class: "name", for: "layer"}, "Layer"), input, told);
  drawers.push(() => {
    const run = runA(), found = layersOf(run), roles = rolesOf(run).filter(role => run.entry(atOf(run), role, shownLayer()));
    const whose = roles.length < rolesOf(run).length ? ` of ${roles.join(" and ")}` : "";
    input.max = found.length - 1;
    input.value = found.indexOf(shownLayer());
    input.hidden = found.length === 1;
    input.setAttribute("aria-valuetext", `layer ${shownLayer()}${whose}`);
    told.textContent = found.length === 1 ? `only layer ${shownLayer()} was recorded` : shownLayer() + whose;
    element.classList.toggle("alone", found.length === 1);
    fillTrack(input);
  });
  return element;
}

function heads() {
  const select = el("select", {id: "head", onchange: () => change({head: Number(select.value)})});
  const element = el("div", {class: "control"}, el("label", {class: "name", for: "head"}, "Head"), select);
  drawers.push(() => {
    const run = runA(), count = Math.max(0, ...rolesOf(run).map(role => run.entry(atOf(run), role, shownLayer())?.heads ?? 0));
    if (view.head >= count) view.head = -1;
    if (select.options.length !== count + 1) {
      select.replaceChildren(...Array.from({length: count + 1}, (_, i) => el("option", {value: i - 1}, headName(i - 1))));
    }
    select.value = String(view.head);
  });
  return element;
}
