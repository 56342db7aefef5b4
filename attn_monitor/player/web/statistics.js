// The numbers in the caption of a map.
import { allFinite, entropyOf, fixed, massMask, meanOf, peakOf, percent } from "./numbers.js";
import { overlaps } from "./patch_grid.js";
import { view } from "./view.js";

/** @import {PatchGrid} from "./types" */

/** @typedef {{before: string, value: string, after?: string, title?: string}} Statistic */

/**
 * Entropy, and of a large tile area of the mask and peak; overlap with ground truth where there is one.
 * @param {Float32Array} values
 * @param {PatchGrid} patchGrid
 * @param {Uint8Array[]} truths
 * @param {boolean} large
 * @returns {Statistic[]}
 */
export function statisticsOf(values, patchGrid, truths, large) {
  if (!allFinite(values)) return [{ before: "missing: ", value: "NaN" }];
  const signed = values.some((value) => value < 0); // no distribution, and no mask
  const mask = massMask(values, view.threshold);
  const entropy = fixed(entropyOf(values), 2);
  /** @type {Statistic[]} */
  const statistics = [{ before: "H ", value: entropy, title: "entropy over patches: 1 uniform, 0 one patch" }];
  if (large) {
    const peak = signed ? "–" : `${fixed(peakOf(values), 1)}×`;
    statistics.push({ before: "mask ", value: percent(signed ? NaN : meanOf(mask)), title: "area of the mask" });
    statistics.push({ before: "peak ", value: peak, title: "largest weight in units of uniform attention" });
  }
  if (truths.length && !signed && (large || view.truth)) {
    const overlap = fixed(meanOf(overlaps(mask, patchGrid, truths)), 2);
    const title = "overlap (intersection over union) of the mask with ground truth, mean over objects";
    statistics.push({ before: "IoU ", value: overlap, title });
  }
  return statistics;
}

/**
 * @param {Float32Array[]} pair maps of runs A and B
 * @param {boolean} comparable
 * @param {boolean} large
 * @returns {Statistic[]}
 */
export function comparisonOf([a, b], comparable, large) {
  if (!comparable) return [{ before: "different grids", value: "" }];
  if (view.compare === "difference") {
    const moved = a.reduce((sum, value, i) => sum + Math.abs(value - b[i]), 0) / 2;
    const title = "half the sum of absolute differences";
    return [{ before: "", value: percent(moved), after: large ? " elsewhere" : "", title }];
  }
  return [
    { before: large ? "H A " : "H ", value: fixed(entropyOf(a), 2), title: "entropy in A" },
    { before: large ? "B " : "", value: fixed(entropyOf(b), 2), title: "entropy in B" },
  ];
}
