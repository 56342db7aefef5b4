// What is shown, in one object; whoever changes it asks for a new picture, and a link can restore it.

const DEFAULTS = {
  step: null, image: 0, all: false, layer: null, head: -1, arrange: "focus", sort: "index", show: "attention",
  opacity: 0.85, scale: "uniform", table: "inferno", mask: true, truth: true, threshold: 0.6, compare: "side",
  swipe: 0.5, metric: "entropy", speed: 8, pin: -1, theme: "auto", run: null, other: null,
};

export const view = {...DEFAULTS};

// What is of the moment only: the patch of a grid below the pointer, {image, patch, place}, whether it plays, and the runs.
export const now = {hover: null, playing: false, runs: [], at: 0, drawn: new Set()};

let asked = false;

// Change the view and draw it in the next frame.
export function change(changes = {}) {
  Object.assign(view, changes);
  ask();
}

export function hover(place) {
  if (JSON.stringify(place) === JSON.stringify(now.hover)) return;
  now.hover = place;
  ask();
}

function ask() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    for (const draw of now.drawn) draw();
  });
}

// `draw` is called whenever something has changed.
export function whenChanged(draw) {
  now.drawn.add(draw);
}

// The patch that numbers are told of: the one below the pointer, else the one that was chosen.
export function chosenPatch() {
  if (now.hover) return now.hover;
  return view.pin >= 0 ? pinned() : null;
}

// A link names a patch of the grid of the role that stands first.
export const pinned = () => ({image: view.image, patch: view.pin, place: firstPlace()});

export const firstPlace = () => runA().layout(now.at).find(entry => entry.layer === shownLayer()).place;

export const runA = () => now.runs[0];
export const runB = () => now.runs[1];

// The snapshot of a run at or nearest to the step that is shown; of two that are as near the earlier.
export function atOf(run) {
  if (run === runA()) return now.at;
  const step = runA().steps[now.at].step;
  let best = 0;
  run.steps.forEach((other, i) => {
    if (Math.abs(other.step - step) < Math.abs(run.steps[best].step - step)) best = i;
  });
  return best;
}

export function goTo(at) {
  const last = runA().steps.length - 1;
  now.at = Math.max(0, Math.min(last, at));
  view.step = now.at === last ? null : runA().steps[now.at].step;
  view.image = Math.min(view.image, runA().images.length - 1);
  change();
}

export function goToStep(step) {
  const steps = runA().steps;
  let best = steps.length - 1;
  if (step !== null) steps.forEach((s, i) => {
    if (Math.abs(s.step - step) < Math.abs(steps[best].step - step)) best = i;
  });
  goTo(best);
}

export function layersOf(run, at = atOf(run)) {
  return [...new Set(run.layout(at).map(entry => entry.layer))].sort((a, b) => a - b);
}

// The layer that is shown of a snapshot: the chosen one, of a second run that of the first, or the last one there is.
export function shownLayer(run = runA(), at = atOf(run)) {
  const layers = layersOf(run, at), wanted = run === runA() ? view.layer : shownLayer();
  return layers.includes(wanted) ? wanted : layers[layers.length - 1];
}

export const rolesOf = run => [...new Set(run.layout(atOf(run)).map(entry => entry.role))];

// The class of a role's colour: those of student and teacher, and three more in turn.
export function classOf(role) {
  const known = ["student", "teacher"];
  if (known.includes(role)) return `role-${role}`;
  const roles = new Set(runA().layouts.flat().map(entry => entry.role));
  return `role-${[...roles].filter(other => !known.includes(other)).indexOf(role) % 3}`;
}

// As the part of a link after "#": what is not as it is at first.
export function asHash() {
  const told = Object.entries(view).filter(([key, value]) => value !== DEFAULTS[key] && value !== null);
  return new URLSearchParams(told.map(([key, value]) => [key, String(value)])).toString();
}

// Values of a link are believed only where they are of the right kind.
export function fromHash(hash) {
  const restored = {...DEFAULTS};
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!Object.hasOwn(DEFAULTS, key)) continue;
    const known = DEFAULTS[key];
    if (typeof known === "boolean") restored[key] = text === "true";
    else if (typeof known === "number" || key === "step" || key === "layer") {
      if (text !== "" && Number.isFinite(Number(text))) restored[key] = Number(text);
    } else if (key === "run" || key === "other" || key === "metric" || CHOICES[key]?.includes(text)) restored[key] = text;
  }
  return Object.assign(view, limited(restored));
}

const CHOICES = {
  arrange: ["focus", "grid", "single"], sort: ["index", "entropy"], show: ["attention", "colors", "cosine"],
  scale: ["uniform", "minmax"], table: ["inferno", "viridis"], compare: ["side", "swipe", "difference"],
  theme: ["auto", "light", "dark"],
};

function limited(values) {
  const within = (key, low, high) => values[key] = Math.max(low, Math.min(high, values[key]));
  within("opacity", 0, 1);
  within("threshold", 0.05, 1);
  within("swipe", 0, 1);
  within("speed", 1, 30);
  for (const key of ["head", "image", "pin"]) values[key] = Math.trunc(values[key]);
  within("head", -1, Infinity);
  within("image", 0, runA() ? runA().images.length - 1 : Infinity);
  return values;
}
