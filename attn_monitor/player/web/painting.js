// Draws one map on a canvas: photograph, colours, outlines of mask and ground truth, cursor.
import {colourDifference, colourMap, MASK_COLOUR, MISSING, TRUTH_COLOUR} from "./colours.js";
import {entropyOf, isFinite32, massMask} from "./numbers.js";
import {boxOf, unseenBands} from "./places.js";

const PRACTICALLY_UNIFORM = 0.995; // entropy above which which patches are largest is noise, and nothing is outlined

const scratch = document.createElement("canvas");

// Make the canvas a whole number of pixels for each patch, at least as fine as it is shown.
export function fitCanvas(canvas, {cell, size}, cssWidth) {
  const across = Math.max(4, Math.min(64, Math.ceil(cssWidth * Math.min(2, devicePixelRatio) * cell[1] / size[1])));
  const down = Math.max(1, Math.round(across * cell[0] / cell[1]));
  const [height, width] = [down, across].map((pixels, axis) => Math.max(1, Math.round(pixels * size[axis] / cell[axis])));
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
}

// What is outlined: the mass mask, empty where attention is practically uniform.
export function outlined(values, threshold) {
  return entropyOf(values) > PRACTICALLY_UNIFORM ? new Uint8Array(values.length) : massMask(values, threshold);
}

// `content` is one of {values, scale}, {a, b} for a difference, {colours}; all over `photo`.
export function paintMap(canvas, {photo, place, content, opacity, table, mask, truths, cursor, pin, clip}) {
  const context = canvas.getContext("2d"), {width, height} = canvas;
  context.save();
  if (clip) {
    context.beginPath();
    context.rect(clip * width, 0, width, height);
    context.clip();
  }
  paintPhoto(context, photo, content ? Math.min(1, 2 * opacity) : 0, width, height);
  if (content) paintContent(context, content, place, opacity, table, width, height);
  if (content && opacity > 0) paintUnseen(context, unseenBands(place, width, height), width);
  if (truths?.length) strokeTruths(context, truths, place.size, width, height);
  if (mask) strokeMask(context, mask, place, width, height, MASK_COLOUR, lineOf(width));
  if (pin >= 0) strokeCell(context, pin, place, width, height, true);
  if (cursor >= 0) strokeCell(context, cursor, place, width, height, false);
  context.restore();
}

export const lineOf = width => Math.max(1, Math.round(width / 220));

const KEPT_SIZES = 8; // of each photograph
const scaled = new WeakMap();

// The photograph, or so much of it in dark grey: scaled once to the size of a canvas, as it is the same at every step.
function paintPhoto(context, photo, dark, width, height) {
  if (!photo.complete || !photo.naturalWidth) {
    context.fillStyle = "#808080";
    context.fillRect(0, 0, width, height);
    return;
  }
  if (dark < 1) context.drawImage(photoAt(photo, false, width, height), 0, 0);
  if (dark > 0) {
    context.globalAlpha = dark;
    context.drawImage(photoAt(photo, true, width, height), 0, 0);
    context.globalAlpha = 1;
  }
}

function photoAt(photo, dark, width, height) {
  if (!scaled.has(photo)) scaled.set(photo, new Map());
  const sizes = scaled.get(photo), key = `${width} ${height} ${dark}`;
  if (!sizes.has(key)) {
    if (sizes.size >= KEPT_SIZES) sizes.clear();
    const canvas = Object.assign(document.createElement("canvas"), {width, height}), context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(dark ? greyOf(photo) : photo, 0, 0, width, height);
    sizes.set(key, canvas);
  }
  return sizes.get(key);
}

const greys = new WeakMap();

// The photograph in dark grey, below the colours that then mean attention alone.
function greyOf(photo) {
  if (!greys.has(photo)) {
    const grey = document.createElement("canvas");
    grey.width = photo.naturalWidth;
    grey.height = photo.naturalHeight;
    const context = grey.getContext("2d");
    context.drawImage(photo, 0, 0);
    const image = context.getImageData(0, 0, grey.width, grey.height), data = image.data;
    for (let i = 0; i < data.length; i += 4) {
      data[i] = data[i + 1] = data[i + 2] = 0.72 * (0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2]);
    }
    context.putImageData(image, 0, 0);
    greys.set(photo, grey);
  }
  return greys.get(photo);
}

function paintContent(context, content, place, opacity, table, width, height) {
  const {values, scale, a, b, colours} = content, [gh, gw] = place.grid, box = boxOf(place, width, height);
  const known = [values, a, b].filter(Boolean);
  if (!known.every(isFinite32)) {
    context.fillStyle = MISSING;
    context.fillRect(0, 0, width, height);
    return;
  }
  scratch.width = gw;
  scratch.height = gh;
  const small = scratch.getContext("2d"), image = small.createImageData(gw, gh);
  if (colours) {
    for (let i = 0; i < gw * gh; i++) image.data.set([...colours.subarray(3 * i, 3 * i + 3), 255 * opacity], 4 * i);
  } else if (a) {
    colourDifference(image.data, a, b, opacity);
  } else {
    colourMap(image.data, values, scale, table, opacity);
  }
  small.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(scratch, box.x, box.y, box.width, box.height);
}

// Parts of the image that no patch sees are dark and hatched.
function paintUnseen(context, bands, width) {
  if (!bands.length) return;
  const line = lineOf(width), period = 6 * line;
  context.save();
  context.beginPath();
  for (const band of bands) context.rect(...band);
  context.clip();
  context.fillStyle = "rgba(12, 12, 16, 0.7)";
  context.fill();
  context.strokeStyle = "rgba(150, 150, 160, 0.5)";
  context.lineWidth = line;
  context.beginPath();
  for (let x = 0; x < width + context.canvas.height; x += period) {
    context.moveTo(x, 0);
    context.lineTo(x - context.canvas.height, context.canvas.height);
  }
  context.stroke();
  context.restore();
}

// The inner border of a mask of patches, of what the canvas has of them.
function strokeMask(context, mask, place, width, height, colour, line) {
  const [gh, gw] = place.grid, inside = (y, x) => y >= 0 && x >= 0 && y < gh && x < gw && mask[y * gw + x];
  context.fillStyle = colour;
  for (let y = 0; y < gh; y++) for (let x = 0; x < gw; x++) {
    if (!mask[y * gw + x]) continue;
    const {left, top, right, bottom} = cellOf(place, y, x, width, height);
    if (!inside(y - 1, x)) context.fillRect(left, top, right - left, line);
    if (!inside(y + 1, x)) context.fillRect(left, bottom - line, right - left, line);
    if (!inside(y, x - 1)) context.fillRect(left, top, line, bottom - top);
    if (!inside(y, x + 1)) context.fillRect(right - line, top, line, bottom - top);
  }
}

function cellOf(place, row, column, width, height) {
  const {x, y, w, h} = boxOf(place, width, height), within = (a, most) => Math.max(0, Math.min(most, a));
  return {
    left: within(x + column * w, width), right: within(x + (column + 1) * w, width),
    top: within(y + row * h, height), bottom: within(y + (row + 1) * h, height),
  };
}

const borders = new WeakMap();

// The border of an object of pixels, as a path in pixels of the image.
function borderOf(object, [height, width]) {
  if (!borders.has(object)) {
    const path = new Path2D();
    const differ = (y, x, v, u) => object[y * width + x] !== (v < 0 || u < 0 || v >= height || u >= width ? 0 : object[v * width + u]);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      if (!object[y * width + x]) continue;
      if (differ(y, x, y - 1, x)) { path.moveTo(x, y); path.lineTo(x + 1, y); }
      if (differ(y, x, y + 1, x)) { path.moveTo(x, y + 1); path.lineTo(x + 1, y + 1); }
      if (differ(y, x, y, x - 1)) { path.moveTo(x, y); path.lineTo(x, y + 1); }
      if (differ(y, x, y, x + 1)) { path.moveTo(x + 1, y); path.lineTo(x + 1, y + 1); }
    }
    borders.set(object, path);
  }
  return borders.get(object);
}

function strokeTruths(context, truths, size, width, height) {
  context.save();
  context.scale(width / size[1], height / size[0]);
  context.strokeStyle = TRUTH_COLOUR;
  context.lineCap = "square";
  context.lineWidth = lineOf(width) * size[1] / width;
  for (const object of truths) context.stroke(borderOf(object, size));
  context.restore();
}

// One patch, in white on black, so that it is seen on every colour; a chosen one is thicker.
function strokeCell(context, patch, place, width, height, thick) {
  const columns = place.grid[1], line = lineOf(width) * (thick ? 1.5 : 1);
  const {left, top, right, bottom} = cellOf(place, Math.floor(patch / columns), patch % columns, width, height);
  for (const [colour, breadth] of [["#000", 3 * line], ["#fff", line]]) {
    context.strokeStyle = colour;
    context.lineWidth = breadth;
    context.strokeRect(left, top, right - left, bottom - top);
  }
}
