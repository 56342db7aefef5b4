// Where on a colour table a weight stands: the scales of attn_monitor.draw.scales and draw.differences.

const LOWEST = -1, HIGHEST = 5; // log2 of the uniform scale's ends
const DIFFERENCE_RANGE = 4; // log2(1 + |difference|) at the ends: 15 times uniform attention
export const RUN_COLOURS = [[255, 160, 40], [70, 170, 255]];
export const MISSING = "rgb(90, 30, 30)", MASK_COLOUR = "rgb(64, 224, 255)", TRUTH_COLOUR = "rgb(120, 255, 80)";

export const SCALES = {
  uniform: {label: "× uniform attention", ticks: ["0.5", "1", "2", "4", "8", "16", "32"]},
  minmax: {label: "each map from its own least to its own most", ticks: ["min", "max"]},
  cosine: {label: "cosine to the chosen patch", ticks: ["-1", "-0.5", "0", "0.5", "1"]},
  difference: {label: "× uniform attention more in A, in B", ticks: ["15", "7", "3", "1", "0", "1", "3", "7", "15"]},
};

const tables = {};

export function learnTables(encoded) {
  for (const [name, text] of Object.entries(encoded)) {
    tables[name] = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  }
}

// Levels 0…1 of a map's weights.
function levelsOf(values, scale) {
  const count = values.length, levels = new Float32Array(count);
  if (scale === "minmax") {
    const low = Math.min(...values), span = Math.max(Math.max(...values) - low, 1e-12);
    for (let i = 0; i < count; i++) levels[i] = (values[i] - low) / span;
  } else if (scale === "cosine") {
    for (let i = 0; i < count; i++) levels[i] = (values[i] + 1) / 2;
  } else {
    for (let i = 0; i < count; i++) {
      const level = (Math.log2(Math.max(values[i] * count, 1e-12)) - LOWEST) / (HIGHEST - LOWEST);
      levels[i] = Math.min(1, Math.max(0, level));
    }
  }
  return levels;
}

// Writes a map as red, green, blue and opacity: what attention is strong covers the photograph more.
export function colourMap(pixels, values, scale, table, opacity) {
  const levels = levelsOf(values, scale), colours = tables[table];
  for (let i = 0; i < levels.length; i++) {
    const entry = 3 * Math.floor(levels[i] * 255);
    pixels[4 * i] = colours[entry];
    pixels[4 * i + 1] = colours[entry + 1];
    pixels[4 * i + 2] = colours[entry + 2];
    pixels[4 * i + 3] = 255 * opacity * (scale === "cosine" ? 1 : 0.55 + 0.45 * levels[i]);
  }
}

// The same for b - a: in the colour of the run that has more; no difference shows nothing.
export function colourDifference(pixels, a, b, opacity) {
  for (let i = 0; i < a.length; i++) {
    const units = (b[i] - a[i]) * a.length;
    colourLevel(pixels, i, Math.sign(units) * Math.min(1, Math.log2(1 + Math.abs(units)) / DIFFERENCE_RANGE), opacity);
  }
}

function colourLevel(pixels, i, level, opacity) {
  const strength = Math.abs(level), colour = RUN_COLOURS[level < 0 ? 0 : 1];
  for (let c = 0; c < 3; c++) pixels[4 * i + c] = colour[c] * (0.45 + 0.55 * strength);
  pixels[4 * i + 3] = 255 * opacity * Math.min(0.95, 1.3 * strength);
}

// The colour bar: one row of pixels on a canvas that the style stretches.
export function drawBar(canvas, scale, table) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width = 256, canvas.height = 1);
  for (let i = 0; i < 256; i++) {
    if (scale === "difference") {
      colourLevel(image.data, i, i / 127.5 - 1, 1);
    } else {
      image.data.set(tables[table].subarray(3 * i, 3 * i + 3), 4 * i);
      image.data[4 * i + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}
