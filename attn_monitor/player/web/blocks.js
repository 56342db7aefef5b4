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
   * @param {Uint16Array} queries (images, heads, queries, tokens), bits of float16: attention of patches
   * @param {Uint8Array} colours (images, patches, 3)
   */
  constructor(layer, rows, features, queries, colours) {
    this.heads = layer.heads;
    this.prefix = layer.prefix.length;
    this.patches = patchesOf(layer);
    this.width = layer.features;
    this.rowBits = rows;
    this.featureBits = features;
    this.queries = layer.queries.length;
    this.queryBits = queries;
    this.colourBytes = colours;
  }

  /**
   * One head's weights of all tokens.
   * @param {number} image
   * @param {number} head
   * @param {number} query which of the layer's queries, -1 for the recorded one
   */
  row(image, head, query = -1) {
    const tokens = this.prefix + this.patches;
    const index = image * this.heads + head;
    const start = (query < 0 ? index : index * this.queries + query) * tokens;
    return (query < 0 ? this.rowBits : this.queryBits).subarray(start, start + tokens);
  }

  /**
   * One head's weights of the patches, or the mean over heads for -1.
   * @param {number} image
   * @param {number} head
   * @param {number} query as in `row`
   */
  map(image, head, query = -1) {
    if (head >= 0) return fromHalves(this.row(image, head, query).subarray(this.prefix));
    const mean = new Float32Array(this.patches);
    for (let h = 0; h < this.heads; h++) {
      const weights = this.map(image, h, query);
      for (let i = 0; i < mean.length; i++) mean[i] += weights[i] / this.heads;
    }
    return mean;
  }

  /**
   * The weight of one token in one head, or the mean over heads for -1; NaN where there is no such head.
   * @param {number} image
   * @param {number} head
   * @param {number} token
   * @param {number} query as in `row`
   */
  weight(image, head, token, query = -1) {
    if (head >= this.heads) return NaN;
    const heads = head >= 0 ? [head] : range(this.heads);
    const weights = fromHalves(Uint16Array.from(heads, (h) => this.row(image, h, query)[token]));
    return weights.reduce((sum, weight) => sum + weight, 0) / heads.length;
  }

  /**
   * The weight of one patch in units of uniform attention, NaN where there is no such patch or head.
   * @param {number} image
   * @param {number} head
   * @param {number} patch
   * @param {number} query as in `row`
   */
  patchWeight(image, head, patch, query = -1) {
    if (patch < 0 || patch >= this.patches) return NaN;
    return this.patches * this.weight(image, head, this.prefix + patch, query);
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
  const queries = layers.map((layer, i) => rows[i] * layer.queries.length);
  const colours = layers.map((layer) => (layer.colors ? 3 * images * patchesOf(layer) : 0));
  const count = sumOf(rows) + sumOf(features) + sumOf(queries);
  if (bytes.length !== 2 * count + sumOf(colours)) throw new Error("the snapshot has changed, reload the page");
  const halves = new Uint16Array(count);
  for (let i = 0; i < count; i++) halves[i] = bytes[i] | (bytes[count + i] << 8);
  let row = 0;
  let feature = sumOf(rows);
  let query = sumOf(rows) + sumOf(features);
  let colour = 2 * count;
  const parts = layers.map((layer, i) => [
    layer.role,
    new LayerBlock(
      layer,
      halves.subarray(row, (row += rows[i])),
      halves.subarray(feature, (feature += features[i])),
      halves.subarray(query, (query += queries[i])),
      bytes.subarray(colour, (colour += colours[i])),
    ),
  ]);
  return Object.fromEntries(parts);
}
