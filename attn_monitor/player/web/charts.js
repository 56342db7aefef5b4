// Line charts as SVG: curves over steps, with a line at the step that is shown.
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// `lines` are {className, points: [[step, value], …]}; values that are null leave a gap.
export function makeChart(className, label, {inset = 0} = {}) {
  const lines = svg("g"), cursor = svg("line", {class: "cursor"}), dots = svg("g");
  const drawing = svg("svg", {class: "plot", preserveAspectRatio: "none", "aria-hidden": "true"}, lines, cursor, dots);
  const top = Object.assign(document.createElement("span"), {className: "axis top"});
  const bottom = Object.assign(document.createElement("span"), {className: "axis bottom"});
  const element = document.createElement("div");
  element.className = `chart ${className}`;
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  element.append(drawing, top, bottom);
  let drawn = "", scale = null;

  function draw(curves, domain, step, written, bounds = null) {
    const {clientWidth: width, clientHeight: height} = element;
    if (!width) return;
    const key = JSON.stringify([curves.map(c => [c.className, c.points.length, c.points.at(-1), c.points[0], c.id]), domain, width, height, bounds]);
    if (key !== drawn) {
      drawn = key;
      scale = scaleOf(curves, domain, width, height, inset, bounds);
      drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
      lines.replaceChildren(...curves.map(curve => svg("path", {class: `line ${curve.className}`, d: pathOf(curve.points, scale)})));
      top.textContent = scale.high > -Infinity ? written(scale.high) : "";
      bottom.textContent = scale.low < Infinity ? written(scale.low) : "";
    }
    const x = scale.x(step);
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", 0], ["y2", height]]) cursor.setAttribute(name, value);
    dots.replaceChildren(...curves.filter(curve => curve.dotted).flatMap(curve => {
      const found = curve.points.find(point => point[0] === step && point[1] !== null);
      return found ? [svg("circle", {class: `point ${curve.className}`, r: 3, cx: x, cy: scale.y(found[1])})] : [];
    }));
  }
  return {element, draw};
}

function scaleOf(curves, [first, last], width, height, inset, bounds) {
  const values = curves.flatMap(curve => curve.points.map(point => point[1])).filter(Number.isFinite);
  let [low, high] = bounds ?? [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - Math.max(1e-3, Math.abs(low) / 10), high + Math.max(1e-3, Math.abs(high) / 10)];
  const margin = 6;
  return {
    low, high,
    x: step => inset + (last > first ? (step - first) / (last - first) : 0.5) * (width - 2 * inset),
    y: value => height - margin - (value - low) / (high - low) * (height - 2 * margin),
  };
}

function pathOf(points, {x, y}) {
  let path = "", pen = "M";
  for (const [step, value] of points) {
    if (!Number.isFinite(value)) {
      pen = "M";
      continue;
    }
    path += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  }
  return path;
}
