// What is shown side by side: roles, of one run or of two.
import { rolesOf, runA, runB, shownIndex, shownLayer, view } from "./view.js";

/** @import {Column, Layer} from "./types" */
/** @import {LayerBlock} from "./blocks.js" */
/** @import {Run} from "./run.js" */

/**
 * @typedef {object} Part of a column: one run
 * @property {Run} run
 * @property {Layer} [layer] missing where it was not recorded
 * @property {LayerBlock} [block] missing where it is not loaded
 */

/**
 * Roles side by side; of two runs each, or both on one canvas where they are swiped or subtracted.
 * @returns {Column[]}
 */
export function shownColumns() {
  const [a, b] = [runA(), runB()];
  const roles = rolesOf(a).filter((role) => a.layer(shownIndex(a), role, shownLayer()));
  return roles.flatMap((role) => {
    if (!b) return { title: role, role, runs: [a] };
    if (view.compare !== "side") return { title: role, role, runs: [a, b] };
    return [a, b].map((run, side) => ({ title: `${role} · ${"AB"[side]}`, role, runs: [run], side }));
  });
}

/**
 * @param {Column} column
 * @returns {Part[]}
 */
export function partsOf({ runs, role }) {
  return runs.map((run) => {
    const [index, layer] = [shownIndex(run), shownLayer(run)];
    return { run, layer: run.layer(index, role, layer), block: run.cached(index, layer)?.[role] };
  });
}
