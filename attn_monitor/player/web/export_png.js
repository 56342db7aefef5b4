// The view as a PNG: the shown maps with their captions, the step, and the colour bar.
import { drawColourBar, SCALES } from "./colours.js";
import { contextOf } from "./elements.js";
import { grouped, percent } from "./numbers.js";
import { shownScale } from "./stage.js";
import { runA, runB, shownLayer, shownStep, view } from "./view.js";

const [MARGIN, HEADER, FOOTER, BAR] = [24, 64, 64, 260]; // pixels, the last one is the colour bar's width
const RESOLUTION = 2; // pixels of the PNG for each of the page

/**
 * @param {HTMLElement} pictures
 * @returns {Promise<Blob>}
 */
export function toPng(pictures) {
  const box = pictures.getBoundingClientRect();
  const canvas = document.createElement("canvas");
  canvas.width = RESOLUTION * (box.width + 2 * MARGIN);
  canvas.height = RESOLUTION * (box.height + HEADER + FOOTER + MARGIN);
  const context = contextOf(canvas);
  const style = getComputedStyle(document.body);
  context.scale(RESOLUTION, RESOLUTION);
  context.fillStyle = style.backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  drawHeader(context, style);
  context.translate(MARGIN - box.left, HEADER - box.top);
  drawMaps(context, pictures);
  drawTexts(context, pictures, style);
  context.translate(box.left, box.top + box.height + 16);
  drawFooter(context, style);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large for this browser"))));
  });
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {CSSStyleDeclaration} style of the page
 */
function drawHeader(context, style) {
  const details = [`step ${grouped(shownStep())}`, `layer ${shownLayer()}`];
  if (!view.all) details.push(runA().images[view.image].name);
  context.fillStyle = style.color;
  context.font = `600 16px ${style.fontFamily}`;
  context.fillText(runB() ? `${runA().name} and ${runB()?.name}` : runA().name, MARGIN, 30);
  context.font = `13px ${style.fontFamily}`;
  context.fillText(details.join(" · "), MARGIN, 50);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {HTMLElement} pictures
 */
function drawMaps(context, pictures) {
  context.imageSmoothingEnabled = false;
  for (const map of /** @type {NodeListOf<HTMLCanvasElement>} */ (
    pictures.querySelectorAll(".tile:not(.stale) canvas")
  )) {
    const { left, top, width, height } = map.getBoundingClientRect();
    context.drawImage(map, left, top, width, height);
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {HTMLElement} pictures
 * @param {CSSStyleDeclaration} style of the page
 */
function drawTexts(context, pictures, style) {
  for (const text of pictures.querySelectorAll("h2, .tile:not(.stale) .caption, .small, .detail")) {
    const { left, top, width, height } = text.getBoundingClientRect();
    if (!width) continue; // hidden on small pages
    const { color, fontWeight, fontSize } = getComputedStyle(text);
    const shown = [...text.childNodes].filter((node) => !(node instanceof Element) || node.getClientRects().length);
    context.fillStyle = color;
    context.font = `${fontWeight} ${fontSize} ${style.fontFamily}`;
    const words = shown.map((node) => node.textContent?.trim()).join("   ");
    context.fillText(words, left, top + height / 2 + 5, Math.max(width, 10));
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {CSSStyleDeclaration} style of the page
 */
function drawFooter(context, style) {
  const scale = shownScale();
  const { unit, ticks } = SCALES[scale];
  const bar = document.createElement("canvas");
  drawColourBar(bar, scale, view.table);
  context.imageSmoothingEnabled = true;
  context.drawImage(bar, 0, 0, BAR, 10);
  context.fillStyle = style.color;
  context.font = `12px ${style.fontFamily}`;
  ticks.forEach((tick, i) => {
    context.textAlign = i === 0 ? "left" : i === ticks.length - 1 ? "right" : "center";
    context.fillText(tick, (BAR * i) / (ticks.length - 1), 26);
  });
  context.textAlign = "left";
  const mask = view.mask && scale !== "difference" ? ` · outlined: top ${percent(view.threshold)} of attention` : "";
  context.fillText(unit + mask, BAR + MARGIN, 10);
}
