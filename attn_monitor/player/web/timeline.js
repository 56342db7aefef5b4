// One slider of steps for everything: playback, curves with a line at the shown step, health flags as marks.
import { byId, changeDetector, el } from "./elements.js";
import { LineChart, rangeOf } from "./line_chart.js";
import { manifest } from "./manifest.js";
import { formatted, grouped } from "./numbers.js";
import { togglePlay } from "./playback.js";
import {
  change,
  roleClass,
  rolesOf,
  runA,
  runB,
  shownIndex,
  shownLayer,
  shownStep,
  shownSteps,
  showSnapshot,
  showStep,
  state,
  view,
} from "./view.js";

/** @import {Curve, Flag, Pair} from "./types" */
/** @import {Run} from "./run.js" */

const INSET = 9; // pixels: half of the slider's thumb, so that curves are aligned with the slider
const SPEEDS = [2, 4, 8, 15, 30]; // snapshots a second

/** @type {Record<string, (() => number) | undefined>} */
const SLIDER_KEYS = {
  ArrowLeft: () => state.index - 1,
  ArrowDown: () => state.index - 1,
  ArrowRight: () => state.index + 1,
  ArrowUp: () => state.index + 1,
  Home: () => 0,
  End: () => Infinity,
  PageUp: () => state.index + 5,
  PageDown: () => state.index - 5,
};

export function makeTimeline() {
  const parts = [makeTransport(), makeSlider(), makeFlags(), makeCurves()];
  const [transport, slider, flags, curves] = parts.map((part) => part.element);
  const track = el("div", { class: "track" }, slider, flags);
  const attributes = { class: "timeline", "aria-label": "timeline" };
  return {
    element: el("section", attributes, transport, track, curves),
    draw: () => {
      byId("time").hidden = shownSteps().length === 1 && !manifest.server; // a model, not a run
      parts.forEach((part) => part.draw());
    },
  };
}

/**
 * The first and the last step of all shown runs.
 * @returns {Pair}
 */
export function shownDomain() {
  const steps = shownSteps();
  return [steps[0], steps[steps.length - 1]];
}

/**
 * Where a step lies between the first and the last one, 0…1.
 * @param {number} step
 * @param {Pair} domain
 * @param {number} otherwise where there is one step
 */
const position = (step, [first, last], otherwise) => (last > first ? (step - first) / (last - first) : otherwise);

function makeTransport() {
  const play = el("button", { type: "button", class: "play", onclick: togglePlay });
  /** @type {(text: string, name: string, key: string, by: number) => HTMLButtonElement} */
  const stepButton = (text, name, key, by) => {
    const onclick = () => showSnapshot(state.index + by);
    return el(
      "button",
      { type: "button", class: "icon", title: `${name} (${key})`, "aria-label": name, onclick },
      text,
    );
  };
  const step = el("output", { class: "step" });
  const epoch = el("span", { class: "epoch" });
  const speed = el(
    "select",
    { "aria-label": "speed", title: "snapshots a second", onchange: () => change({ speed: Number(speed.value) }) },
    ...SPEEDS.map((rate) => el("option", { value: rate }, `${rate}/s`)),
  );
  const element = el(
    "div",
    { class: "transport" },
    stepButton("‹", "one step back", "←", -1),
    play,
    stepButton("›", "one step forward", "→", 1),
    el("div", { class: "when" }, step, epoch),
    speed,
  );
  function draw() {
    const run = runA();
    step.textContent = `step ${grouped(shownStep())}`;
    const place = `${state.index + 1} of ${shownSteps().length}`;
    epoch.textContent = runB() ? place : `${place}, epoch ${run.steps[shownIndex(run)].epoch}`;
    play.textContent = state.playing ? "❚❚" : "▶";
    play.ariaLabel = state.playing ? "pause" : "play";
    speed.value = String(view.speed);
  }
  return { element, draw };
}

function makeSlider() {
  const oninput = () => showStep(Number(element.value));
  const element = el("input", { type: "range", class: "steps", "aria-label": "step", step: 1, oninput });
  element.addEventListener("keydown", (event) => {
    const index = SLIDER_KEYS[event.key]?.();
    if (index === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    showSnapshot(index);
  });
  function draw() {
    const domain = shownDomain();
    const step = shownStep();
    [element.min, element.max, element.value] = [...domain, step].map(String);
    element.style.setProperty("--filled", `${100 * position(step, domain, 1)}%`);
    element.ariaValueText = `step ${step}, snapshot ${state.index + 1} of ${shownSteps().length}`;
  }
  return { element, draw };
}

function makeFlags() {
  const element = el("div", { class: "marks", role: "group", "aria-label": "health flags" });
  const flagsChanged = changeDetector();
  function draw() {
    const domain = shownDomain();
    if (!flagsChanged(...state.runs, ...state.runs.map(({ steps }) => steps))) return;
    /** @type {Map<number, number>} */
    const counts = new Map(); // flags of one step are side by side
    const flags = state.runs.flatMap(({ steps }, i) =>
      steps.flatMap((step) => step.flags.map((flag) => ({ flag, of: runB() ? `${"AB"[i]}: ` : "" }))),
    );
    const marks = flags.map(({ flag, of }) => {
      const count = counts.get(flag.step) ?? 0;
      counts.set(flag.step, count + 1);
      const words = of + flag.words;
      const attributes = { type: "button", class: "flag", title: words, "aria-label": `health flag: ${words}` };
      const mark = el("button", { ...attributes, onclick: () => showFlag(flag) }, "⚑");
      const at = position(flag.step, domain, 0.5);
      mark.style.setProperty("--at", String(at));
      mark.style.setProperty("--beside", String(at > 0.5 ? -count : count));
      return mark;
    });
    element.replaceChildren(...marks);
  }
  return { element, draw };
}

/** @param {Flag} flag of a layer, or of the whole model, which may have been found between two snapshots */
function showFlag(flag) {
  if (flag.layer !== null) change({ layer: flag.layer, head: flag.heads[0] ?? -1, all: false });
  showStep(flag.step);
}

function makeCurves() {
  const select = el("select", { "aria-label": "curve", onchange: () => change({ metric: select.value }) });
  const reading = el("div", { class: "reading" });
  const chart = new LineChart("curves", "curve over steps", INSET);
  const element = el("div", { class: "curve" }, el("div", { class: "which" }, select, reading), chart.element);
  /** @type {(Curve & {role: string, side: number})[]} */
  let curves = [];
  /** @type {string[]} */
  let names = [];
  const stepsChanged = changeDetector();
  const curvesChanged = changeDetector();

  function draw() {
    const [a, b] = [runA(), runB()];
    const layer = shownLayer();
    if (stepsChanged(a, a.steps, layer)) {
      names = metricsOf(a, layer);
      select.replaceChildren(...names.map((name) => el("option", { value: name }, name.replaceAll("_", " "))));
    }
    const name = names.includes(view.metric) ? view.metric : (names[0] ?? "");
    const domain = shownDomain();
    element.hidden = names.length === 0;
    select.value = name;
    const sources = state.runs.flatMap((run) => [run, run.steps, shownLayer(run), rolesOf(run).join()]);
    if (curvesChanged(name, view.head, ...sources)) {
      curves = state.runs.flatMap((run, side) => rolesOf(run).flatMap((role) => curvesOf(run, side, role, name)));
      chart.element.ariaLabel = `${name.replaceAll("_", " ")} over steps ${domain[0]} to ${domain[1]}`;
    }
    const step = shownStep();
    chart.draw(curves, domain, step, formatted, rangeOf(name));
    const values = curves
      .filter(({ dotted }) => dotted)
      .map(({ role, side, className, points }) => {
        const last = points.findLast((point) => point[0] <= step && point[1] !== null);
        const label = b ? `${role} ${"AB"[side]} ` : `${role} `;
        return el("span", { class: `value ${className}` }, label, el("b", {}, formatted(last?.[1])));
      });
    reading.replaceChildren(...values);
  }
  return { element, draw };
}

/**
 * The curve of a metric's mean, and that of the selected head where it has one.
 * @param {Run} run
 * @param {number} side 0 for A, 1 for B
 * @param {string} role
 * @param {string} name
 */
function curvesOf(run, side, role, name) {
  const keys = [`${role}/${shownLayer(run)}/${name}`, `${role}/model/${name}`];
  const className = roleClass(role) + (side ? " other" : "");
  /** @type {(index: number) => Curve["points"]} */
  const points = (index) =>
    run.steps.map(({ step, metrics }) => [step, metrics[keys[0]]?.[index] ?? metrics[keys[1]]?.[index] ?? null]);
  const mean = { className: `${className} mean`, points: points(0), dotted: true, role, side };
  const head = { className: `${className} head`, points: points(view.head + 1), dotted: false, role, side };
  return view.head >= 0 && head.points.some((point) => point[1] !== null) ? [head, mean] : [mean];
}

/**
 * Metrics that a layer, or the whole model, has at any step.
 * @param {Run} run
 * @param {number} layer
 */
function metricsOf(run, layer) {
  const keys = new Set(run.steps.flatMap(({ metrics }) => Object.keys(metrics)));
  const names = [...keys].flatMap((key) => {
    const [name, number] = key.split("/").reverse();
    const isOfRole = key.slice(0, key.indexOf("/")) !== "training";
    return isOfRole && (number === String(layer) || number === "model") ? [name] : [];
  });
  return [...new Set(names)];
}
