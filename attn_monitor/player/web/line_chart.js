// A line chart as SVG: curves over steps, with a vertical line at the shown step.
import { changeDetector, el, svg } from "./elements.js";

/** @import {Curve, Pair} from "./types" */

const MARGIN = 6; // pixels above and below the curves

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
   * @param {number} step
   * @param {(value: number) => string} format
   */
  draw(curves, domain, step, format) {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!width) return;
    if (this.curvesChanged(curves, ...domain, width, height)) this.drawCurves(curves, domain, width, height, format);
    const scale = /** @type {Scale} */ (this.scale);
    const x = scale.x(step);
    for (const [name, value] of Object.entries({ x1: x, x2: x, y2: height }))
      this.cursor.setAttribute(name, `${value}`);
    const dots = curves.flatMap(({ className, points, dotted }) => {
      const value = dotted ? points.find((point) => point[0] === step)?.[1] : null;
      return isNumber(value) ? [svg("circle", { class: `point ${className}`, r: 3, cx: x, cy: scale.y(value) })] : [];
    });
    this.dots.replaceChildren(...dots);
  }

  /**
   * @param {Curve[]} curves
   * @param {Pair} domain
   * @param {number} width
   * @param {number} height
   * @param {(value: number) => string} format
   */
  drawCurves(curves, [first, last], width, height, format) {
    const values = curves.flatMap(({ points }) => points.map((point) => point[1])).filter(isNumber);
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const pad = low === high ? Math.max(1e-3, Math.abs(low) / 10) : 0;
    [low, high] = [low - pad, high + pad];
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
    this.top.textContent = values.length ? format(high) : "";
    this.bottom.textContent = values.length ? format(low) : "";
  }
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
