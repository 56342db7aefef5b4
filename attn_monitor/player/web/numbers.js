// Statistics of one map, as attn_monitor.functional defines them: p is attention on patches, normalised to sum 1.

// Every float16 as a float32: looking it up is faster than shifting bits for each number.
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
});

/**
 * @param {Uint16Array} halves bits of float16 numbers
 * @returns {Float32Array}
 */
export function fromHalves(halves) {
  const numbers = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) numbers[i] = HALVES[halves[i]];
  return numbers;
}

/** @param {Float32Array} values */
export const allFinite = (values) => values.every(Number.isFinite);

/**
 * All zeros become uniform; null where a weight is negative or not finite, which is no distribution.
 * @param {Float32Array} values
 */
function normalised(values) {
  let total = 0;
  for (const value of values) {
    if (!Number.isFinite(value) || value < 0) return null;
    total += value;
  }
  total = Math.fround(total);
  return Float64Array.from(values, (value) => (total === 0 ? 1 / values.length : Math.fround(value / total)));
}

/**
 * From 0 (one patch) to 1 (uniform); NaN where there is no distribution.
 * @param {Float32Array} values
 */
export function entropyOf(values) {
  const p = normalised(values);
  if (!p) return NaN;
  let total = 0;
  for (const share of p) if (share > 0) total -= share * Math.log(share);
  return p.length === 1 ? 0 : total / Math.log(p.length);
}

/**
 * DINO's mask: shares in ascending order are summed, and kept from the first whose sum exceeds 1 - threshold.
 * @param {Float32Array} values
 * @param {number} threshold
 * @returns {Uint8Array} 1 in the mask, 0 outside; empty where there is no distribution
 */
export function massMask(values, threshold) {
  const mask = new Uint8Array(values.length);
  const p = normalised(values);
  if (!p) return mask;
  const ascending = p.slice().sort();
  let first = 0;
  let sum = 0;
  while (first < p.length && (sum += ascending[first]) <= 1 - threshold + 1e-6) first++;
  const least = ascending[first];
  // Of equal shares at the limit the last ones are kept, as by a stable sort.
  let equal = 0;
  while (first + equal < p.length && ascending[first + equal] === least) equal++;
  for (let i = p.length - 1; i >= 0; i--) mask[i] = p[i] > least || (p[i] === least && equal-- > 0) ? 1 : 0;
  return mask;
}

/**
 * The largest weight in units of uniform attention.
 * @param {Float32Array} values
 */
export function peakOf(values) {
  const p = normalised(values);
  return p ? Math.max(...p) * p.length : NaN;
}

/** @param {number[] | Uint8Array} values */
export function meanOf(values) {
  let sum = 0;
  for (const value of values) sum += value;
  return sum / values.length;
}

/**
 * Cosine similarity of one patch's features to those of every patch.
 * @param {Float32Array} features (patches, width)
 * @param {number} width
 * @param {number} patch
 */
export function cosines(features, width, patch) {
  const count = features.length / width;
  const norms = new Float64Array(count);
  const products = new Float64Array(count);
  for (let n = 0; n < count; n++) {
    for (let k = 0; k < width; k++) {
      norms[n] += features[n * width + k] ** 2;
      products[n] += features[n * width + k] * features[patch * width + k];
    }
  }
  return Float32Array.from(products, (product, n) => product / Math.max(1e-12, Math.sqrt(norms[n] * norms[patch])));
}

/**
 * Three significant digits, or a whole number where it is large.
 * @param {number | null | undefined} value
 */
export function formatted(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  if (size >= 0.1 || size === 0) return value.toFixed(2);
  return size >= 0.001 ? value.toFixed(3) : value.toExponential(1);
}

/**
 * @param {number} value
 * @param {number} digits
 */
export const fixed = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

/** @param {number} share */
export const percent = (share) => (Number.isFinite(share) ? `${Math.round(100 * share)} %` : "–");

/**
 * With a narrow space between groups of three digits.
 * @param {number} number
 */
export const grouped = (number) => String(number).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");

/** @param {number} count */
export const range = (count) => [...Array(count).keys()];
