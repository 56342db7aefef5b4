// What has become of each run, above everything: its state, since when, and on opening the evidence and what to do.
import { changeDetector, el } from "./elements.js";
import { grouped } from "./numbers.js";
import { runDot } from "./tile.js";
import { runB, showStep, state } from "./view.js";

/** @import {Run} from "./run.js" */
/** @import {Verdict} from "./types" */

const ICONS = { good: "✓", bad: "!", none: "…" };
const NOT_YET = "Some snapshots more are needed before a run is judged.";
const HEALTHY = "No sign of collapse, divergence or decay in the metrics of all snapshots so far.";

export function makeVerdicts() {
  const element = el("section", { class: "verdicts", "aria-label": "verdict" });
  const runsChanged = changeDetector();
  function draw() {
    const { runs } = state;
    if (!runsChanged(...runs, ...runs.map(({ steps }) => steps))) return;
    const open = [...element.querySelectorAll("details")].map((details) => details.open);
    element.replaceChildren(...runs.flatMap((run, i) => verdictOf(run, i, Boolean(open[i]))));
    element.hidden = !element.children.length;
  }
  return { element, draw };
}

/**
 * The verdict at a run's last snapshot; undefined where it was not judged.
 * @param {Run} run
 */
export const latestVerdict = (run) => run.steps[run.steps.length - 1].verdict ?? undefined;

/**
 * @param {Verdict} verdict
 * @returns {"good" | "bad" | "none"}
 */
export const kindOf = ({ state }) => (state === "healthy" ? "good" : state === "no verdict yet" ? "none" : "bad");

/**
 * A state with its sign, as colours alone do not say it to everybody.
 * @param {Verdict} verdict
 */
export function chipOf(verdict) {
  const kind = kindOf(verdict);
  const icon = el("span", { class: "icon", "aria-hidden": "true" }, ICONS[kind]);
  return el("span", { class: `chip ${kind}` }, icon, verdict.state);
}

/**
 * @param {Run} run
 * @param {number} side 0 for A, 1 for B
 * @param {boolean} open
 */
function verdictOf(run, side, open) {
  const verdict = latestVerdict(run);
  if (!verdict) return [];
  const { since, evidence, advice } = verdict;
  const kind = kindOf(verdict);
  const texts = kind === "bad" ? evidence : [kind === "good" ? HEALTHY : NOT_YET];
  const name = runB() ? [el("b", { class: "name" }, runDot(side), "AB"[side])] : [];
  const when = since === null ? [] : [el("span", {}, `since step ${grouped(since)}`)];
  const first = el("span", { class: "evidence" }, texts[0] ?? "");
  const parts = [
    ...texts.map((text) => el("p", {}, text)),
    ...(advice ? [el("p", {}, el("b", {}, "What to do: "), `${advice}.`)] : []),
    historyOf(run),
  ];
  const summary = el("summary", {}, ...name, chipOf(verdict), ...when, first);
  return [el("details", { class: `verdict ${kind}`, open }, summary, el("div", { class: "why" }, ...parts))];
}

/**
 * Each state that the run has been in, as a button that shows its first step.
 * @param {Run} run
 */
function historyOf(run) {
  const judged = run.steps.filter(({ verdict }) => verdict);
  const changes = judged.filter(({ verdict }, i) => verdict?.state !== judged[i - 1]?.verdict?.state);
  const buttons = changes.map(({ step, verdict }) =>
    el("button", { type: "button", onclick: () => showStep(step) }, `step ${grouped(step)}: ${verdict?.state}`),
  );
  return el("p", { class: "states" }, "Judged at ", ...buttons);
}
