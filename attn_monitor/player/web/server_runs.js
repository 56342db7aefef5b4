// The runs of a server: menus to select one and another to compare, and updates while they train.
import { byId, el } from "./elements.js";
import { fetchNames, fetchRun, refresh } from "./server.js";
import { showError, showStatus } from "./status.js";
import { requestDraw, runA, shownStep, shownSteps, showSnapshot, showStep, state, view } from "./view.js";

const POLL_MS = 4000; // between two updates
const POLL_PENDING_MS = 50; // where the server has more snapshots to read

let connected = true;

/** Open the runs of the link, or the last run that can be shown. */
export async function openServer() {
  const names = await fetchNames();
  if (!names.length) throw new Error("There are no attention maps in the log directory yet.");
  const wanted = [...names].reverse();
  if (view.run && names.includes(view.run)) wanted.unshift(view.run);
  state.runs = [await fetchFirst(wanted)];
  view.run = runA().name;
  if (view.other && names.includes(view.other)) await openOther(view.other);
  drawMenus(names);
  setTimeout(poll, POLL_PENDING_MS);
}

/**
 * The first of these runs that can be fetched; the error of the last one where none can.
 * @param {string[]} names
 */
async function fetchFirst(names) {
  for (const name of names.slice(0, -1)) {
    try {
      return await fetchRun(name);
    } catch (error) {
      showStatus(`${name}: ${/** @type {Error} */ (error).message}`);
    }
  }
  return fetchRun(names[names.length - 1]);
}

/**
 * @param {string} name "" for none
 */
async function openOther(name) {
  const run = runA();
  const other = name && name !== run.name ? await fetchRun(name) : null;
  const same = other?.facts.probe === run.facts.probe;
  if (other && !same) showStatus(`${name} has other images than ${run.name}, so their maps cannot be compared`);
  const step = view.step ?? null;
  state.runs = other && same ? [run, other] : [run];
  view.other = other && same ? name : null;
  showStep(step);
}

/** @param {string} name */
async function openRun(name) {
  const run = await fetchRun(name);
  Object.assign(view, { run: name, other: null, step: null, pin: -1, head: -1, layer: null });
  Object.assign(state, { runs: [run], playing: false, hover: null });
  showSnapshot(Infinity);
}

/** @param {string[]} names */
function drawMenus(names) {
  const options = () => names.map((name) => el("option", { value: name }, name));
  const first = el("select", { "aria-label": "run" }, ...options());
  const none = el("option", { value: "" }, "compare with …");
  const second = el("select", { "aria-label": "compare with" }, none, ...options());
  const update = () => {
    first.value = view.run ?? "";
    second.value = view.other ?? "";
    requestDraw();
  };
  first.addEventListener("change", () => openRun(first.value).catch(showError).finally(update));
  second.addEventListener("change", () => openOther(second.value).catch(showError).finally(update));
  second.hidden = names.length < 2;
  update();
  byId("runs").replaceChildren(first, second);
}

/** Fetch what is new. Where the last snapshot is shown, the new last one is shown. */
async function poll() {
  try {
    const names = await fetchNames();
    const [menu] = /** @type {HTMLSelectElement[]} */ ([...byId("runs").children]);
    if (names.join("\n") !== [...menu.options].map(({ value }) => value).join("\n")) drawMenus(names);
    for (const run of state.runs.filter(({ name }) => names.includes(name))) await update(run);
    if (!connected) showStatus("");
    connected = true;
  } catch (error) {
    connected = false;
    showStatus(`cannot update: ${/** @type {Error} */ (error).message}`);
  }
  setTimeout(poll, state.runs.some((run) => run.facts.pending) ? POLL_PENDING_MS : POLL_MS);
}

/** @param {import("./run.js").Run} run */
async function update(run) {
  const { index, playing } = state;
  const atEnd = index === shownSteps().length - 1 && !playing;
  const step = shownStep();
  if (!(await refresh(run)) || !state.runs.includes(run)) return;
  if (atEnd) showSnapshot(Infinity);
  else showStep(step);
}
