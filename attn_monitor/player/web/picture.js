// The view as a PNG: the pictures that are shown with their captions, the step, and the colour bar.
import {drawBar, SCALES} from "./colours.js";
import {grouped, percent} from "./numbers.js";
import {now, runA, runB, shownLayer, view} from "./view.js";
import {scaleShown} from "./stage.js";

const MARGIN = 24, HEADER = 64, FOOTER = 64;

// As it is laid out on the page, at twice its size.
export function pictureOf(stage) {
  const box = stage.pictures.getBoundingClientRect(), times = 2, canvas = document.createElement("canvas");
  canvas.width = times * (box.width + 2 * MARGIN);
  canvas.height = times * (box.height + HEADER + FOOTER + MARGIN);
  const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
  context.scale(times, times);
  context.fillStyle = style.backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = style.color;
  const run = runA(), image = run.images[view.image].name;
  write(context, `${run.name}${runB() ? ` and ${runB().name}` : ""}`, MARGIN, 30, `600 16px ${style.fontFamily}`);
  write(context, `step ${grouped(run.steps[now.at].step)} · layer ${shownLayer()}${view.all ? "" : ` · ${image}`}`, MARGIN, 50, `13px ${style.fontFamily}`);
  for (const map of stage.pictures.querySelectorAll(".tile:not(.stale) canvas")) {
    const at = map.getBoundingClientRect();
    context.imageSmoothingEnabled = false;
    context.drawImage(map, at.left - box.left + MARGIN, at.top - box.top + HEADER, at.width, at.height);
  }
  for (const text of stage.pictures.querySelectorAll("h2, .tile:not(.stale) .caption, .small, .detail")) {
    const at = text.getBoundingClientRect(), own = getComputedStyle(text);
    if (!at.width) continue; // what small pages leave out
    context.fillStyle = own.color;
    const words = [...text.childNodes].filter(node => node.nodeType === Node.TEXT_NODE || node.getClientRects().length).map(node => node.textContent.trim()).join("   ");
    write(context, words, at.left - box.left + MARGIN, at.top - box.top + HEADER + at.height / 2 + 5, `${own.fontWeight} ${own.fontSize} ${style.fontFamily}`, at.width);
  }
  drawFooter(context, box.height + HEADER + 16, style);
  return new Promise(resolve => canvas.toBlob(resolve, "image/png"));
}

function drawFooter(context, top, style) {
  const bar = document.createElement("canvas"), scale = scaleShown(), {label, ticks} = SCALES[scale];
  drawBar(bar, scale, view.table);
  context.imageSmoothingEnabled = true;
  context.drawImage(bar, MARGIN, top, 260, 10);
  context.fillStyle = style.color;
  ticks.forEach((tick, i) => {
    context.textAlign = i === 0 ? "left" : i === ticks.length - 1 ? "right" : "center";
    write(context, tick, MARGIN + 260 * i / (ticks.length - 1), top + 26, `12px ${style.fontFamily}`);
  });
  context.textAlign = "left";
  const mask = view.mask && scale !== "difference" ? ` · outlined: top ${percent(view.threshold)} of attention` : "";
  write(context, label + mask, MARGIN + 284, top + 10, `12px ${style.fontFamily}`);
}

function write(context, text, x, y, font, most = undefined) {
  context.font = font;
  if (most === undefined) context.fillText(text, x, y);
  else context.fillText(text, x, y, Math.max(most, 10));
}
