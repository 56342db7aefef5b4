// Numbers of one map, as attn_monitor.functional defines them: p is attention on patches, renormalised to sum 1.

// Every float16 as a float32: a table is faster than shifting bits for each number.
const HALVES = Float32Array.from({length: 65536}, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
});

export function fromHalves(halves) {
  const numbers = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) numbers[i] = HALVES[halves[i]];
  return numbers;
}

export const isFinite32 = values => values.every(Number.isFinite);

// Scaled to sum 1; all zeros become uniform, and weights of which some are negative are no distribution: null.
function normalised(values) {
  let total = 0;
  for (const value of values) {
    if (!Number.isFinite(value) || value < 0) return null;
    total += value;
  }
  total = Math.fround(total);
  return Float64Array.from(values, value => total === 0 ? 1 / values.length : Math.fround(value / total));
}

// 0 one patch … 1 uniform; NaN where there is no distribution.
export function entropyOf(values) {
  const p = normalised(values);
  if (!p) return NaN;
  let total = 0;
  for (const share of p) if (share > 0) total -= share * Math.log(share);
  return p.length === 1 ? 0 : total / Math.log(p.length);
}

// DINO's mask: ascending, cumulated, kept where the sum exceeds 1 - threshold; the patch that crosses it is kept.
export function massMask(values, threshold) {
  const mask = new Uint8Array(values.length), p = normalised(values);
  if (!p) return mask;
  const ascending = p.slice().sort();
  let first = 0, sum = 0;
  while (first < p.length && (sum += ascending[first]) <= 1 - threshold + 1e-6) first++;
  const least = ascending[first];
  // Of equal shares at the crossing those that come last are kept, as by a stable sort.
  let equal = 0;
  while (first + equal < p.length && ascending[first + equal] === least) equal++;
  for (let i = p.length - 1; i >= 0; i--) mask[i] = p[i] > least || (p[i] === least && equal-- > 0) ? 1 : 0;
  return mask;
}

export const shareOf = mask => mask.reduce((sum, inside) => sum + inside, 0) / mask.length;

// The largest weight in units of uniform attention.
export function peakOf(values) {
  const p = normalised(values);
  return p ? Math.max(...p) * p.length : NaN;
}

export const meanOf = values => values.reduce((sum, value) => sum + value, 0) / values.length;

// Cosine of one patch's features to those of all, from (N, K) numbers.
export function cosines(features, width, patch) {
  const count = features.length / width, norms = new Float64Array(count), products = new Float64Array(count);
  for (let n = 0; n < count; n++) {
    for (let k = 0; k < width; k++) {
      norms[n] += features[n * width + k] ** 2;
      products[n] += features[n * width + k] * features[patch * width + k];
    }
  }
  return Float32Array.from(products, (product, n) => product / Math.max(1e-12, Math.sqrt(norms[n] * norms[patch])));
}

// For people: three figures, or whole numbers where those are large.
export function written(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 0.1 || size === 0 ? value.toFixed(2)
    : size >= 0.001 ? value.toFixed(3) : value.toExponential(1);
}

export const percent = share => Number.isFinite(share) ? `${Math.round(100 * share)} %` : "–";

export const grouped = number => String(number).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
