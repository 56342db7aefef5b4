// The numbers in the caption of a map.
import { allFinite, entropyOf, fixed, massMask, meanOf, peakOf, percent } from "./numbers.js";
import { matchingPatch, overlaps } from "./patch_grid.js";
import { drawing } from "./manifest.js";
import { pinnedPatch, view } from "./view.js";

/** @import {PatchGrid} from "./types" */
/** @import {Content} from "./painting.js" */

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
  const entropy = entropyOf(values);
  const uniform = entropy > drawing.practically_uniform; // the order of its patches is noise, and it has no mask
  const before = large ? "entropy " : "H ";
  /** @type {Statistic[]} */
  const statistics = [{ before, value: fixed(entropy, 2), title: "entropy over patches: 1 uniform, 0 one patch" }];
  if (large) {
    const area = percent(signed ? NaN : meanOf(mask));
    const peak = signed ? "–" : `${fixed(peakOf(values), 1)}×`;
    if (!uniform) statistics.push({ before: "mask ", value: area, title: "area of the mask" });
    statistics.push({ before: "peak ", value: peak, title: "largest weight in units of uniform attention" });
  }
  if (uniform) {
    if (large) statistics.push({ before: "", value: "uniform", after: `: no mask${truths.length ? ", no IoU" : ""}` });
    return statistics;
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
    return [{ before: "", value: percent(moved), after: large ? " of attention moved" : "", title }];
  }
  return [
    { before: large ? "entropy A " : "H ", value: fixed(entropyOf(a), 2), title: "entropy in A" },
    { before: large ? "B " : "", value: fixed(entropyOf(b), 2), title: "entropy in B" },
  ];
}

/**
 * The caption of a large tile that shows no attention: colours of features, or their cosines; null for attention.
 * @param {Content | null} content
 * @param {PatchGrid} patchGrid
 * @returns {{name: string, statistics: Statistic[]} | null}
 */
export function featuresOf(content, patchGrid) {
  if (content?.colours) {
    return { name: "PCA of features", statistics: [{ before: "like colour, like feature", value: "" }] };
  }
  if (content?.scale !== "cosine" || !content.values) return null;
  const columns = patchGrid.shape[1];
  const pinned = matchingPatch(patchGrid, pinnedPatch());
  const mean = fixed(meanOf([...content.values]), 2);
  const name = `cosine to patch ${Math.floor(pinned / columns)}, ${pinned % columns}`;
  return { name, statistics: [{ before: "mean ", value: mean, title: "mean cosine over patches" }] };
}
