// A run: its steps, its images, and a cache of its blocks, which come from this file or from a server.
import { unpackBlock } from "./blocks.js";
import { byId } from "./elements.js";
import { makePatchGrid } from "./patch_grid.js";
import { requestDraw } from "./view.js";

/** @import {Manifest, RunFacts, RunUpdate, Step} from "./types" */
/** @typedef {ReturnType<typeof unpackBlock>} Block */

const CACHE_BYTES = 192 * 2 ** 20; // of inflated blocks; the oldest are dropped

export class Run {
  /**
   * @param {RunFacts} facts
   * @param {(step: Step, layer: number) => Promise<Uint8Array<ArrayBuffer>>} fetchBlock the deflated block
   */
  constructor(facts, fetchBlock) {
    this.fetchBlock = fetchBlock;
    /** @type {Map<string, {block: Block, size: number}>} */
    this.cache = new Map();
    /** @type {Map<string, Promise<Block>>} */
    this.pendingBlocks = new Map();
    this.cachedBytes = 0;
    this.facts = facts;
    this.photos = facts.images.map((image) => Object.assign(new Image(), { onload: requestDraw, src: image.photo }));
    this.truths = facts.images.map((image) => image.truth.map((runs) => decodeMask(runs, facts.size)));
  }

  /** @param {RunFacts} facts of the same run, which has gone back to an earlier step or was filled in between */
  replace(facts) {
    Object.assign(this, new Run(facts, this.fetchBlock));
  }

  /**
   * Add new steps.
   * @param {RunUpdate} update
   */
  append(update) {
    const after = this.steps.at(-1)?.step ?? -1;
    const steps = [...this.steps, ...update.steps.filter((step) => step.step > after)];
    this.facts = { ...this.facts, ...update, steps };
  }

  get name() {
    return this.facts.name;
  }

  get images() {
    return this.facts.images;
  }

  get steps() {
    return this.facts.steps;
  }

  /**
   * The layers of all roles at a snapshot.
   * @param {number} index of the snapshot
   */
  layout(index) {
    const layout = this.facts.layouts[this.steps[index].layout];
    for (const layer of layout) layer.patchGrid ??= makePatchGrid(layer.grid, layer.geometry, this.facts.size);
    return layout;
  }

  /**
   * @param {number} index
   * @param {string} role
   * @param {number} layer
   */
  layer(index, role, layer) {
    return this.layout(index).find((found) => found.role === role && found.layer === layer);
  }

  /**
   * A cached block.
   * @param {number} index
   * @param {number} layer
   */
  cached(index, layer) {
    return this.cache.get(`${this.steps[index].step}/${layer}`)?.block;
  }

  /**
   * A block, fetched where it is not in the cache.
   * @param {number} index
   * @param {number} layer
   * @returns {Promise<Block>}
   */
  load(index, layer) {
    const step = this.steps[index];
    const key = `${step.step}/${layer}`;
    const known = this.cache.get(key)?.block ?? this.pendingBlocks.get(key);
    if (known) return Promise.resolve(known);
    const { pendingBlocks } = this; // another map once the run is replaced, and what was fetched is out of date
    const layers = this.layout(index).filter((found) => found.layer === layer);
    const block = (async () => {
      try {
        const bytes = await inflate(await this.fetchBlock(step, layer));
        const unpacked = unpackBlock(bytes, layers, this.images.length);
        if (this.pendingBlocks === pendingBlocks) this.store(key, unpacked, bytes.length);
        return unpacked;
      } finally {
        pendingBlocks.delete(key);
      }
    })();
    pendingBlocks.set(key, block);
    return block;
  }

  /**
   * @param {string} key
   * @param {Block} block
   * @param {number} size in bytes
   */
  store(key, block, size) {
    this.cache.set(key, { block, size });
    this.cachedBytes += size;
    for (const [oldest, { size: freed }] of this.cache) {
      if (this.cachedBytes <= CACHE_BYTES || oldest === key) break;
      this.cache.delete(oldest);
      this.cachedBytes -= freed;
    }
  }
}

/**
 * @param {number[]} runs lengths of runs of zeros and ones in turn
 * @param {[number, number]} size of the image
 */
function decodeMask(runs, [height, width]) {
  const mask = new Uint8Array(height * width);
  let start = 0;
  runs.forEach((length, i) => mask.fill(i % 2, start, (start += length)));
  return mask;
}

/** @param {Uint8Array<ArrayBuffer>} bytes */
async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/**
 * The runs in this file.
 * @param {Manifest} manifest
 */
export function runsOfFile(manifest) {
  const text = byId("blocks").textContent ?? "";
  return manifest.runs.map((found) => {
    const same = typeof found.images === "number" ? manifest.runs[found.images].images : found.images;
    const facts = /** @type {RunFacts} */ ({ ...found, images: same });
    return new Run(facts, async (step, layer) => {
      const [offset, length] = step.blocks[layer];
      return Uint8Array.from(atob(text.slice(offset, offset + length)), (character) => character.charCodeAt(0));
    });
  });
}
