// Unpacks blocks: all rows, features and colours of one layer at one step; see attn_monitor.player.blocks.
import { fromHalves, range } from "./numbers.js";

/** @import {Layer} from "./types" */

/** @param {Layer} layer */
const patchesOf = ({ grid }) => grid[0] * grid[1];

/** @param {number[]} values */
const sumOf = (values) => values.reduce((sum, value) => sum + value, 0);

/** The numbers of one role, as views of a block. */
export class LayerBlock {
  /**
   * @param {Layer} layer
   * @param {Uint16Array} rows (images, heads, tokens), bits of float16
   * @param {Uint16Array} features (images, patches, width), bits of float16
   * @param {Uint8Array} colours (images, patches, 3)
   */
  constructor(layer, rows, features, colours) {
    this.heads = layer.heads;
    this.prefix = layer.prefix.length;
    this.patches = patchesOf(layer);
    this.width = layer.features;
    this.rowBits = rows;
    this.featureBits = features;
    this.colourBytes = colours;
  }

  /**
   * One head's weights of all tokens.
   * @param {number} image
   * @param {number} head
   */
  row(image, head) {
    const tokens = this.prefix + this.patches;
    const start = (image * this.heads + head) * tokens;
    return this.rowBits.subarray(start, start + tokens);
  }

  /**
   * One head's weights of the patches, or the mean over heads for -1.
   * @param {number} image
   * @param {number} head
   */
  map(image, head) {
    if (head >= 0) return fromHalves(this.row(image, head).subarray(this.prefix));
    const mean = new Float32Array(this.patches);
    for (let h = 0; h < this.heads; h++) {
      const weights = this.map(image, h);
      for (let i = 0; i < mean.length; i++) mean[i] += weights[i] / this.heads;
    }
    return mean;
  }

  /**
   * The weight of one token in one head, or the mean over heads for -1; NaN where there is no such head.
   * @param {number} image
   * @param {number} head
   * @param {number} token
   */
  weight(image, head, token) {
    if (head >= this.heads) return NaN;
    const heads = head >= 0 ? [head] : range(this.heads);
    const weights = fromHalves(Uint16Array.from(heads, (h) => this.row(image, h)[token]));
    return weights.reduce((sum, weight) => sum + weight, 0) / heads.length;
  }

  /**
   * The weight of one patch in units of uniform attention, NaN where there is no such patch or head.
   * @param {number} image
   * @param {number} head
   * @param {number} patch
   */
  patchWeight(image, head, patch) {
    return patch >= 0 && patch < this.patches ? this.patches * this.weight(image, head, this.prefix + patch) : NaN;
  }

  /** @param {number} image */
  features(image) {
    const count = this.patches * this.width;
    return fromHalves(this.featureBits.subarray(image * count, (image + 1) * count));
  }

  /**
   * Red, green and blue of each patch; null where the layer has no colours.
   * @param {number} image
   */
  colours(image) {
    const count = 3 * this.patches;
    return this.colourBytes.length ? this.colourBytes.subarray(image * count, (image + 1) * count) : null;
  }
}

/**
 * @param {Uint8Array} bytes inflated
 * @param {Layer[]} layers in the order of the block
 * @param {number} images
 * @returns {Record<string, LayerBlock>} by role
 */
export function unpackBlock(bytes, layers, images) {
  const rows = layers.map((layer) => images * layer.heads * (layer.prefix.length + patchesOf(layer)));
  const features = layers.map((layer) => images * patchesOf(layer) * layer.features);
  const colours = layers.map((layer) => (layer.colors ? 3 * images * patchesOf(layer) : 0));
  const count = sumOf(rows) + sumOf(features);
  if (bytes.length !== 2 * count + sumOf(colours)) throw new Error("the snapshot has changed, reload the page");
  const halves = new Uint16Array(count);
  for (let i = 0; i < count; i++) halves[i] = bytes[i] | (bytes[count + i] << 8);
  let row = 0;
  let feature = sumOf(rows);
  let colour = 2 * count;
  const parts = layers.map((layer, i) => [
    layer.role,
    new LayerBlock(
      layer,
      halves.subarray(row, (row += rows[i])),
      halves.subarray(feature, (feature += features[i])),
      bytes.subarray(colour, (colour += colours[i])),
    ),
  ]);
  return Object.fromEntries(parts);
}
