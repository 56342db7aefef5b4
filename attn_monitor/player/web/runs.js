// All runs of the page, of this file or of its server: which are shown, menus to select them, and updates while they train.
import { byId, el } from "./elements.js";
import { manifest } from "./manifest.js";
import { runsOfFile } from "./run.js";
import { fetchNames, fetchRun, refresh } from "./server.js";
import { showError, showStatus } from "./status.js";
import { change, requestDraw, runA, shownStep, shownSteps, showSnapshot, showStep, state, view } from "./view.js";

/** @import {Run} from "./run.js" */

const POLL_MS = 4000; // between two updates
const POLL_PENDING_MS = 50; // where the server has more snapshots to read

const ofFile = runsOfFile(manifest);
let names = ofFile.map(({ name }) => name);
let connected = true;

/** @type {Map<string, Run>} */
const opened = new Map();

/** Names of all runs. */
export const runNames = () => names;

/** Whether the page is opened to compare the two runs of the file. */
const isPair = () => names.length === 2 && !manifest.server && !manifest.list;

/** Whether there are runs to choose from, so that a link names those that are shown. */
const isChoice = () => Boolean(manifest.server) || (names.length > 1 && !isPair());

/**
 * @param {string} name
 * @returns {Promise<Run>}
 */
export async function openedRun(name) {
  const run = opened.get(name) ?? ofFile.find((found) => found.name === name) ?? (await fetchRun(name));
  opened.set(name, run);
  return run;
}

/** Open the runs of the link: of a file else the first ones, of a server the last one that can be shown. */
export async function openRuns() {
  if (manifest.server) names = await fetchNames();
  if (!names.length) throw new Error("There are no attention maps in the log directory yet.");
  const wanted = manifest.server ? [...names].reverse() : [...names];
  if (view.run && names.includes(view.run)) wanted.unshift(view.run);
  state.runs = [await firstOf(wanted)];
  view.run = isChoice() ? runA().name : null;
  const other = view.other ?? (isPair() ? names.find((name) => name !== runA().name) : null);
  if (other && names.includes(other)) await openOther(other);
  if (!isChoice()) view.other = null;
  drawMenus();
  if (manifest.server) setTimeout(poll, POLL_PENDING_MS);
}

/**
 * The first of these runs that can be opened; the error of the last one where none can.
 * @param {string[]} wanted
 */
async function firstOf(wanted) {
  for (const name of wanted.slice(0, -1)) {
    try {
      return await openedRun(name);
    } catch (error) {
      showStatus(`${name}: ${/** @type {Error} */ (error).message}`);
    }
  }
  return openedRun(wanted[wanted.length - 1]);
}

/** @param {string} name "" for none */
async function openOther(name) {
  const run = runA();
  const other = name && name !== run.name ? await openedRun(name) : null;
  const same = other?.facts.probe === run.facts.probe;
  if (other && !same) showStatus(`${name} has other images than ${run.name}, so their maps cannot be compared`);
  const step = view.step;
  state.runs = other && same ? [run, other] : [run];
  view.other = other && same ? name : null;
  showStep(step);
}

/**
 * Show a run alone.
 * @param {string} name
 * @param {number | null} step
 */
export async function openRun(name, step = null) {
  const run = await openedRun(name);
  Object.assign(view, { run: name, other: null, pin: -1, head: -1, layer: null });
  Object.assign(state, { runs: [run], playing: false, hover: null });
  showStep(step);
  drawMenus();
}

function drawMenus() {
  byId("list-button").hidden = names.length < 2;
  if (!isChoice()) return;
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
    const found = await fetchNames();
    if (found.join("\n") !== names.join("\n")) {
      names = found;
      drawMenus();
    }
    const shown = view.list ? [...opened.values()] : state.runs;
    for (const run of shown.filter(({ name }) => names.includes(name))) await update(run);
    if (!connected) showStatus("");
    connected = true;
  } catch (error) {
    connected = false;
    showStatus(`cannot update: ${/** @type {Error} */ (error).message}`);
  }
  setTimeout(poll, state.runs.some((run) => run.facts.pending) ? POLL_PENDING_MS : POLL_MS);
}

/** @param {Run} run */
async function update(run) {
  const { index, playing } = state;
  const atEnd = index === shownSteps().length - 1 && !playing;
  const step = shownStep();
  if (!(await refresh(run))) return;
  if (!state.runs.includes(run)) change({});
  else if (atEnd) showSnapshot(Infinity);
  else showStep(step);
}
