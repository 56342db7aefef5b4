// Puts the page together: runs, links, keys, and loading of what is shown.
import { makeControls, makeThumbnails } from "./controls.js";
import { byId, changeDetector, el } from "./elements.js";
import { toPng } from "./export_png.js";
import { makeHelp } from "./help.js";
import { historyIndices, makeInspector } from "./inspector.js";
import { moveCursor, pin } from "./large_tile.js";
import { grouped } from "./numbers.js";
import { togglePlay } from "./playback.js";
import { makeRunList } from "./run_list.js";
import { openRuns } from "./runs.js";
import { makeStage } from "./stage.js";
import { showError, showStatus } from "./status.js";
import { runDot } from "./tile.js";
import { makeTimeline } from "./timeline.js";
import { makeVerdicts } from "./verdict.js";
import {
  change,
  fromHash,
  onDraw,
  requestDraw,
  runA,
  runB,
  selectedPatch,
  showImage,
  shownImage,
  shownIndex,
  shownLayer,
  shownPicture,
  shownStep,
  shownSteps,
  showPicture,
  showSnapshot,
  showStep,
  state,
  toHash,
  unpin,
  view,
} from "./view.js";

const LINK_DELAY = 150; // milliseconds after a change: browsers allow few changes of the address a second
const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = ["◐", "○", "●"];
const hasAddress = /^(file|https?):$/.test(location.protocol); // not so in a frame of a notebook

const help = makeHelp();

/** @type {Record<string, (() => void) | undefined>} */
const KEYS = {
  ArrowLeft: () => showSnapshot(state.index - 1),
  ArrowRight: () => showSnapshot(state.index + 1),
  Home: () => showSnapshot(0),
  End: () => showSnapshot(Infinity),
  " ": togglePlay,
  m: () => change({ mask: !view.mask }),
  a: () => change({ all: !view.all }),
  "[": () => showImage(shownImage() - 1),
  "]": () => showImage(shownImage() + 1),
  ",": () => showPicture(shownPicture() - 1),
  ".": () => showPicture(shownPicture() + 1),
  Escape: unpin,
  Enter: () => pin(selectedPatch()),
  "?": help.open,
  // With Shift, as arrows alone always move in time.
  "Shift ArrowLeft": () => moveCursor(0, -1),
  "Shift ArrowRight": () => moveCursor(0, 1),
  "Shift ArrowUp": () => moveCursor(-1, 0),
  "Shift ArrowDown": () => moveCursor(1, 0),
};

async function start() {
  if (hasAddress) fromHash(location.hash);
  drawTheme();
  await openRuns();
  const stage = makeStage();
  const [thumbnails, controls, inspector, timeline, verdicts] = [
    makeThumbnails(),
    makeControls(),
    makeInspector(),
    makeTimeline(),
    makeVerdicts(),
  ];
  document.body.append(help.element);
  const list = makeRunList();
  byId("verdict").append(verdicts.element);
  byId("list").append(list.element);
  byId("rail").append(thumbnails.element);
  byId("pictures").append(stage.element);
  byId("side").firstElementChild?.append(controls.element, inspector.element);
  byId("time").append(timeline.element);
  addListeners(stage.pictures);
  byId("loading").hidden = true;
  byId("app").hidden = false;
  showStep(view.step);
  onDraw(...[verdicts, thumbnails, controls, stage, inspector, timeline].map((part) => part.draw));
  onDraw(list.draw, drawHeader, loadShown, updateLink, drawTheme);
}

/** @param {HTMLElement} pictures */
function addListeners(pictures) {
  addEventListener("keydown", onKey);
  if (hasAddress) addEventListener("hashchange", onHashChange);
  addEventListener("scroll", requestDraw, { passive: true }); // the patch's numbers move with it
  new ResizeObserver(requestDraw).observe(byId("pictures"));
  byId("link").hidden = !hasAddress;
  byId("link").addEventListener("click", copyLink);
  byId("png").addEventListener("click", () => savePng(pictures).catch(showError));
  byId("list-button").addEventListener("click", () => change({ list: !view.list }));
  byId("help").addEventListener("click", help.open);
  byId("theme").addEventListener("click", () => {
    change({ theme: THEMES[(THEMES.indexOf(view.theme) + 1) % THEMES.length] });
  });
}

// Loading: what is shown first, then one after another the blocks that the history of a patch needs.

let loadingHistory = false;

function loadShown() {
  const missing = state.runs.filter((run) => !run.cached(shownIndex(run), shownLayer(run)));
  document.body.classList.toggle("waiting", missing.length > 0);
  for (const run of missing) run.load(shownIndex(run), shownLayer(run)).then(requestDraw, showError);
  if (missing.length) return;
  if (!document.body.dataset.ready) {
    document.body.dataset.ready = "true";
    performance.mark("first picture");
  }
  if (loadingHistory) return;
  loadingHistory = true;
  loadHistory()
    .catch(showError)
    .finally(() => (loadingHistory = false));
}

async function loadHistory() {
  for (const run of state.runs) {
    for (const index of historyIndices(run)) {
      const layer = shownLayer(run);
      if (index >= run.steps.length || run.cached(index, layer)) continue;
      if (!run.layout(index).some((found) => found.layer === layer)) continue;
      await run.load(index, layer);
      if (state.hover || view.pin >= 0) requestDraw();
      await new Promise((resolve) => setTimeout(resolve));
    }
  }
}

// The header.

const namesChanged = changeDetector();

function drawHeader() {
  const [a, b] = [runA(), runB()];
  byId("list-button").ariaPressed = String(view.list);
  if (!byId("runs").children.length && namesChanged(a, b)) {
    const names = state.runs.map(({ name }) => el("span", {}, name));
    if (b) names.forEach((name, i) => name.prepend(runDot(i), `${"AB"[i]} `));
    byId("title").replaceChildren(...names);
  }
  const steps = shownSteps();
  const [first, last] = [steps[0], steps[steps.length - 1]].map(grouped);
  const pending = state.runs.reduce((sum, { facts }) => sum + (facts.pending ?? 0), 0);
  const found =
    steps.length === 1 ? `1 snapshot, step ${first}` : `${steps.length} snapshots, steps ${first} to ${last}`;
  const loaded = pending ? `${found}, ${pending} more to load` : found;
  const { caption } = a.facts;
  byId("summary").textContent = caption === "original" ? loaded : `${loaded} · images: ${caption}`;
  byId("summary").classList.toggle("pending", pending > 0);
  const notes = state.runs.map(({ facts }, i) => (b && facts.note ? `${"AB"[i]}: ${facts.note}` : facts.note));
  byId("note").textContent = notes.filter(Boolean).join(". ");
  byId("note").hidden = !byId("note").textContent;
}

function drawTheme() {
  document.documentElement.dataset.theme = view.theme;
  byId("theme").ariaLabel = `theme: ${view.theme}`;
  byId("theme").textContent = THEME_ICONS[THEMES.indexOf(view.theme)];
}

// Links and files.

let linkTimer = 0;

function updateLink() {
  clearTimeout(linkTimer);
  linkTimer = setTimeout(writeLink, LINK_DELAY);
}

function writeLink() {
  const hash = toHash();
  if (!hasAddress || location.hash.slice(1) === hash) return;
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function onHashChange() {
  if (location.hash.slice(1) === toHash()) return;
  const { run, other } = view;
  fromHash(location.hash);
  if (view.run !== run || view.other !== other) location.reload();
  else showStep(view.step);
}

async function copyLink() {
  writeLink();
  try {
    await navigator.clipboard.writeText(location.href);
    showStatus("link copied");
  } catch {
    prompt("Link to this view", location.href);
  }
}

/** @param {HTMLElement} pictures */
async function savePng(pictures) {
  const href = URL.createObjectURL(await toPng(pictures));
  el("a", { href, download: `attention-step-${shownStep()}.png` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}

/**
 * Keys act wherever they have no other meaning: not in fields, and space and Enter not on buttons.
 * @param {KeyboardEvent} event
 */
function onKey(event) {
  const target = event.target instanceof Element ? event.target : document.body;
  const modified = (event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph"); // for [ ]
  if (modified || target.closest("input, select, textarea, dialog")) return;
  if ((event.key === " " || event.key === "Enter") && target.closest("button, summary, a")) return;
  const action = KEYS[event.shiftKey && event.key.startsWith("Arrow") ? `Shift ${event.key}` : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

start().catch(showError);
