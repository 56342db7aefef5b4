// Puts the page together, and keeps it going: runs, links, keys, and what has to be fetched.
import {learnTables} from "./colours.js";
import {grouped} from "./numbers.js";
import {makeControls, makeThumbnails} from "./controls.js";
import {makeInspector, stepsOfHistory} from "./inspector.js";
import {pictureOf} from "./picture.js";
import {PHOTOGRAPH, runsOfFile, Server} from "./source.js";
import {makeStage} from "./stage.js";
import {makeTimeline, togglePlay} from "./timeline.js";
import {asHash, atOf, change, fromHash, goTo, goToStep, hover, now, runA, shownLayer, view, whenChanged} from "./view.js";
import {el, runDot} from "./tiles.js";

const LIVE = 4000; // milliseconds between two looks at a server for news

const manifest = JSON.parse(document.getElementById("manifest").textContent);
const byId = id => document.getElementById(id);
const server = manifest.server ? new Server() : null;
const linked = /^(file|https?):$/.test(location.protocol); // else it is inside of another page, which has its own address

learnTables(manifest.tables);
async function start() {
  if (linked) fromHash(location.hash);
  applyTheme();
  if (server) await openServer();
  else now.runs = runsOfFile(manifest);
  now.at = runA().steps.length - 1;
  const stage = makeStage(), thumbnails = makeThumbnails(), controls = makeControls(), inspector = makeInspector(), timeline = makeTimeline();
  byId("rail").append(thumbnails.element);
  byId("pictures").append(stage.element);
  byId("side").append(controls.element, inspector.element);
  byId("time").append(timeline.element);
  wireButtons(stage);
  addEventListener("keydown", onKey);
  if (linked) addEventListener("hashchange", () => {
    if (location.hash.slice(1) === asHash()) return;
    const {run, other} = view;
    fromHash(location.hash);
    if (server && (view.run !== run || view.other !== other)) location.reload();
    else goToStep(view.step);
  });
  new ResizeObserver(() => change()).observe(byId("pictures"));
  document.addEventListener(PHOTOGRAPH, () => change());
  byId("loading").hidden = true;
  byId("app").hidden = false;
  goToStep(view.step);
  for (const part of [thumbnails, controls, stage, inspector, timeline]) whenChanged(part.draw);
  whenChanged(tellTitle);
  whenChanged(fetchShown);
  whenChanged(keepLink);
  whenChanged(applyTheme);
  if (server) setTimeout(look, 50);
}

// What is shown first, then what the history of a patch needs, one block after another.
let fetching = null;
async function fetchShown() {
  const missing = now.runs.filter(run => !run.peek(atOf(run), shownLayer(run)));
  document.body.classList.toggle("waiting", missing.length > 0);
  for (const run of missing) run.load(atOf(run), shownLayer(run)).then(() => change(), fail);
  if (!missing.length && !document.body.dataset.ready) {
    document.body.dataset.ready = "true";
    performance.mark("first picture");
  }
  if (!missing.length && !fetching) fetching = fetchHistory().catch(fail).finally(() => fetching = null);
}

async function fetchHistory() {
  for (const run of now.runs) for (const at of stepsOfHistory(run)) {
    const layer = shownLayer(run);
    if (at >= run.steps.length || run.peek(at, layer) || !run.layout(at).some(entry => entry.layer === layer)) continue;
    await run.load(at, layer);
    if (now.hover || view.pin >= 0) change();
    await new Promise(resolve => setTimeout(resolve));
  }
}

async function openServer() {
  const names = await server.names();
  if (!names.length) throw new Error("There is no archive below the log directory yet.");
  now.runs = [await firstOf([view.run, ...[...names].reverse()].filter(name => names.includes(name)))];
  view.run = runA().name;
  if (names.includes(view.other) && view.other !== view.run) await openOther(view.other);
  drawRuns(names);
}

// The first of these runs that can be shown; why the last one cannot where none can.
async function firstOf(names) {
  for (const name of names.slice(0, -1)) {
    try {
      return await server.run(name);
    } catch (error) {
      tell(`${name}: ${error.message}`);
    }
  }
  return server.run(names.at(-1));
}

async function openOther(name) {
  const other = name && name !== view.run ? await server.run(name) : null;
  const same = other && other.probe === runA().probe;
  if (other && !same) tell(`${name} shows other images than ${view.run}: their maps cannot be compared`);
  now.runs = same ? [runA(), other] : [runA()];
  view.other = same ? name : null;
}

function drawRuns(names) {
  const option = name => el("option", {value: name}, name);
  const first = el("select", {"aria-label": "run", onchange: () => openRun(first.value)}, ...names.map(option));
  const second = el("select", {"aria-label": "compare with", onchange: () => openOther(second.value).then(() => {
    second.value = view.other ?? "";
    change();
  }, fail)}, el("option", {value: ""}, "compare with …"), ...names.map(option));
  first.value = view.run;
  second.value = view.other ?? "";
  second.hidden = names.length < 2;
  byId("runs").replaceChildren(first, second);
}

async function openRun(name) {
  try {
    const run = await server.run(name);
    Object.assign(view, {run: name, other: null, step: null, pin: -1, head: -1, layer: null});
    now.runs = [run];
    now.playing = false;
    now.hover = null;
    byId("runs").lastChild.value = "";
    goTo(run.steps.length - 1);
  } catch (error) {
    fail(error);
  }
}

// News of a run that is still going: the newest step stays the one that is shown where it was.
let lost = false;
async function look() {
  let soon = false;
  try {
    const names = await server.names(), [first] = byId("runs").children;
    if (String(names) !== String([...first.options].map(option => option.value))) drawRuns(names);
    for (const run of [...now.runs]) {
      const last = run === runA() && now.at === run.steps.length - 1 && !now.playing;
      if (!names.includes(run.name)) continue;
      const step = runA().steps[now.at]?.step;
      if (await server.refresh(run) && run === runA()) last ? goTo(run.steps.length - 1) : goToStep(step);
      soon ||= run.pending > 0;
    }
    if (lost) tell("");
    lost = false;
  } catch (error) {
    lost = true;
    tell(`no news: ${error.message}`);
  }
  setTimeout(look, soon ? 50 : LIVE);
}

function tellTitle() {
  const [a, b] = now.runs, steps = a.steps;
  const names = server ? [] : b ? [`A ${a.name}`, `B ${b.name}`] : [a.name];
  if (byId("title").dataset.names !== names.join()) {
    byId("title").dataset.names = names.join();
    byId("title").replaceChildren(...names.map(name => el("span", {}, name)));
    if (b && !server) [...byId("title").children].forEach((name, i) => name.prepend(runDot(i)));
  }
  byId("summary").textContent = steps.length === 1 ? `1 snapshot, step ${grouped(steps[0].step)}`
    : `${steps.length} snapshots, steps ${grouped(steps[0].step)} to ${grouped(steps.at(-1).step)}`;
  const note = now.runs.flatMap((run, i) => run.note ? `${b ? `${"AB"[i]}: ` : ""}${run.note}` : []).join(". ");
  byId("note").hidden = !note;
  byId("note").textContent = note;
}

// A moment after the last change: browsers allow few of these a second.
let keeping = 0;
function keepLink() {
  if (!linked) return;
  clearTimeout(keeping);
  keeping = setTimeout(writeLink, 150);
}

function writeLink() {
  const hash = asHash();
  if (linked && location.hash.slice(1) !== hash) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function wireButtons(stage) {
  byId("link").hidden = !linked;
  byId("link").addEventListener("click", async () => {
    writeLink();
    try {
      await navigator.clipboard.writeText(location.href);
      tell("link copied");
    } catch {
      prompt("Link to this view", location.href);
    }
  });
  byId("png").addEventListener("click", async () => {
    const address = URL.createObjectURL(await pictureOf(stage));
    el("a", {href: address, download: `attention-step-${runA().steps[now.at].step}.png`}).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  });
  byId("theme").addEventListener("click", () => change({theme: THEMES[(THEMES.indexOf(view.theme) + 1) % 3]}));
}

const THEMES = ["auto", "light", "dark"];

function applyTheme() {
  const root = document.documentElement;
  if (view.theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = view.theme;
  byId("theme").setAttribute("aria-label", `colours of the page: ${view.theme}`);
  byId("theme").textContent = {auto: "◐", light: "○", dark: "●"}[view.theme];
}

let quiet = 0;
function tell(words) {
  byId("told").textContent = words;
  clearTimeout(quiet);
  if (words) quiet = setTimeout(() => byId("told").textContent = "", 6000);
}

function fail(error) {
  if (byId("app").hidden) byId("loading").textContent = error.message;
  else tell(error.message);
  if (!server) throw error;
}

const KEYS = {
  ArrowLeft: () => goTo(now.at - 1), ArrowRight: () => goTo(now.at + 1), Home: () => goTo(0), End: () => goTo(Infinity),
  " ": togglePlay, m: () => change({mask: !view.mask}), a: () => change({all: !view.all}),
  "[": () => change({image: Math.max(0, view.image - 1)}),
  "]": () => change({image: Math.min(runA().images.length - 1, view.image + 1)}),
  Escape: () => {
    hover(null);
    change({pin: -1, show: view.show === "cosine" ? "attention" : view.show});
  },
};

// Keys work wherever they mean nothing else: not in fields, and space not on buttons.
function onKey(event) {
  const modified = (event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph"); // types [ and ]
  if (modified || event.target.closest?.("input, select, textarea")) return;
  if (event.key === " " && event.target.closest?.("button, summary, a")) return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

start().catch(fail);
