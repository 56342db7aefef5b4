// A line chart as SVG: curves over steps, with a vertical line at the shown step.
import { changeDetector, el, svg } from "./elements.js";

/** @import {Curve, Pair} from "./types" */

const MARGIN = 6; // pixels above and below the curves

/**
 * The least range of an axis, so that noise does not look like a change; of other metrics a twentieth of their values.
 * @type {Record<string, number | undefined>}
 */
const LEAST_RANGE = {
  entropy: 0.1,
  mask_area: 0.1,
  prefix_mass: 0.1,
  head_divergence: 0.1,
  student_teacher_divergence: 0.02,
  mask_agreement: 0.1,
  drift: 0.02,
  gram_drift: 0.02,
  outlier_fraction: 0.02,
  cls_patch_cosine: 0.1,
  mean_cosine: 0.1,
  jaccard: 0.1,
  jaccard_best_head: 0.1,
  jaccard_fixed_head: 0.1,
  sink_share: 0.1,
  assignment_entropy_mean: 0.1,
  assignment_entropy_each: 0.1,
  prototypes_used: 0.1,
  prototypes_alike: 0.1,
  peak: 1,
  max_logit: 1,
  max_logit_cls: 1,
  weight: 1,
};

/** @param {string} metric */
export const rangeOf = (metric) => LEAST_RANGE[metric] ?? 0;

export class LineChart {
  /**
   * @param {string} className
   * @param {string} label
   * @param {number} inset pixels left and right of the curves
   */
  constructor(className, label, inset = 0) {
    this.inset = inset;
    this.lines = svg("g");
    this.cursor = svg("line", { class: "cursor", y1: 0 });
    this.dots = svg("g");
    this.plot = svg(
      "svg",
      { class: "plot", preserveAspectRatio: "none", "aria-hidden": "true" },
      this.lines,
      this.cursor,
      this.dots,
    );
    this.top = el("span", { class: "axis top" });
    this.bottom = el("span", { class: "axis bottom" });
    const attributes = { class: `chart ${className}`, role: "img", "aria-label": label };
    this.element = el("div", attributes, this.plot, this.top, this.bottom);
    this.curvesChanged = changeDetector();
    /** @type {Scale | null} */
    this.scale = null;
  }

  /**
   * Curves are drawn again where the array is another one.
   * @param {Curve[]} curves
   * @param {Pair} domain first and last step
   * @param {number} step NaN for none
   * @param {(value: number) => string} format
   * @param {number} least range of the axis
   */
  draw(curves, domain, step, format, least = 0) {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width) return;
    if (this.curvesChanged(curves, ...domain, width, height)) {
      this.drawCurves(curves, domain, [width, height], format, least);
    }
    const scale = /** @type {Scale} */ (this.scale);
    const x = scale.x(step);
    this.cursor.toggleAttribute("hidden", Number.isNaN(step));
    for (const [name, value] of Object.entries(Number.isNaN(step) ? {} : { x1: x, x2: x, y2: height })) {
      this.cursor.setAttribute(name, `${value}`);
    }
    const dots = curves.flatMap(({ className, points, dotted }) => {
      const value = dotted ? points.find((point) => point[0] === step)?.[1] : null;
      return isNumber(value) ? [svg("circle", { class: `point ${className}`, r: 3, cx: x, cy: scale.y(value) })] : [];
    });
    this.dots.replaceChildren(...dots);
  }

  /**
   * @param {Curve[]} curves
   * @param {Pair} domain
   * @param {Pair} size width and height in pixels
   * @param {(value: number) => string} format
   * @param {number} least range of the axis
   */
  drawCurves(curves, [first, last], [width, height], format, least) {
    const values = curves.flatMap(({ points }) => points.map((point) => point[1])).filter(isNumber);
    const [low, high] = axisOf(values, least);
    const scale = {
      x: (/** @type {number} */ step) =>
        this.inset + (last > first ? (step - first) / (last - first) : 0.5) * (width - 2 * this.inset),
      y: (/** @type {number} */ value) => height - MARGIN - ((value - low) / (high - low)) * (height - 2 * MARGIN),
    };
    const paths = curves.map(({ className, points }) =>
      svg("path", { class: `line ${className}`, d: pathOf(points, scale) }),
    );
    this.scale = scale;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.lines.replaceChildren(...paths);
    const same = format(low) === format(high);
    const [bottom, top] = [low, high].map((value) => (same ? value.toPrecision(4) : format(value)));
    this.top.textContent = values.length ? top : "";
    this.bottom.textContent = values.length ? bottom : "";
  }
}

/**
 * Lowest and highest value of an axis. What is nowhere below 0 or above 1 has an axis that is not either.
 * @param {number[]} values
 * @param {number} least its range at least
 * @returns {Pair}
 */
function axisOf(values, least) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const size = Math.max(Math.abs(low), Math.abs(high));
  const lacking = Math.max(0, Math.max(least, size / 20 || 1e-3) - (high - low)) / 2;
  if (low - lacking < 0 && low >= 0) return [0, high + lacking + (lacking - low)];
  if (high + lacking > 1 && high <= 1) return [low - lacking - (high + lacking - 1), 1];
  return [low - lacking, high + lacking];
}

/** @typedef {{x: (step: number) => number, y: (value: number) => number}} Scale */

/**
 * @param {unknown} value
 * @returns {value is number}
 */
const isNumber = (value) => Number.isFinite(value);

/**
 * @param {Curve["points"]} points
 * @param {Scale} scale
 */
function pathOf(points, { x, y }) {
  let pen = "M";
  const parts = points.map(([step, value]) => {
    const part = isNumber(value) ? `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}` : "";
    pen = isNumber(value) ? "L" : "M";
    return part;
  });
  return parts.join("");
}
