// Creating elements, and drawing them again only when what they depend on has changed.

/**
 * An element with attributes and children. Text is text, never HTML; functions are listeners of events.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, any>} attributes `true` sets an attribute without a value, `false` and null leave it out
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/**
 * @template {keyof SVGElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, string | number>} attributes
 * @param {...Node} children
 * @returns {SVGElementTagNameMap[T]}
 */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** @param {string} id */
export const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** @param {HTMLCanvasElement} canvas */
export const contextOf = (canvas) => /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));

/**
 * A function that says whether an argument differs (by `Object.is`) from that of its last call, or this is the first.
 * An element is drawn again where what it depends on has changed: `if (changed(a, b)) draw(a, b)`.
 */
export function changeDetector() {
  /** @type {unknown[] | null} */
  let last = null;
  return (/** @type {unknown[]} */ ...values) => {
    const same = last?.length === values.length && last.every((value, i) => Object.is(value, values[i]));
    last = values;
    return !same;
  };
}
