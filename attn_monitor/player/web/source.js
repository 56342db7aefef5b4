// Runs as the page knows them: their facts, and their blocks of numbers, from this file or from a server.
import {fromHalves} from "./numbers.js";
import {makePlace} from "./places.js";

export const PHOTOGRAPH = "photograph"; // what happens in the document when one can be drawn
const MOST_BYTES = 192 * 2 ** 20; // of decoded blocks that are kept; the oldest go first

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

class Run {
  // `fetchBlock(step, layer)` gives a step's deflated block.
  constructor(facts, fetchBlock) {
    this.fetchBlock = fetchBlock;
    this.kept = new Map();
    this.waiting = new Map();
    this.bytes = 0;
    this.replace(facts);
  }

  replace(facts) {
    Object.assign(this, facts);
    this.kept.clear();
    this.waiting.clear();
    this.bytes = 0;
    const onload = () => document.dispatchEvent(new Event(PHOTOGRAPH));
    this.pictures = this.images.map(image => Object.assign(new Image(), {onload, src: image.photo}));
    this.truths = this.images.map(image => image.truth.map(runs => unrolled(runs, this.size[0] * this.size[1])));
  }

  layout(at) {
    const layout = this.layouts[this.steps[at].layout];
    for (const entry of layout) entry.place ??= makePlace(entry.grid, entry.geometry, this.size);
    return layout;
  }

  entry(at, role, layer) {
    return this.layout(at).find(entry => entry.role === role && entry.layer === layer);
  }

  get flags() {
    return this.steps.flatMap(step => step.flags);
  }

  // The numbers of a step's layer by role, if they are here.
  peek(at, layer) {
    return this.kept.get(`${this.steps[at].step}/${layer}`);
  }

  // The same, asked for where they are not here yet.
  load(at, layer) {
    const step = this.steps[at], key = `${step.step}/${layer}`;
    if (this.kept.has(key)) return Promise.resolve(this.kept.get(key));
    if (!this.waiting.has(key)) {
      const layout = this.layout(at).filter(entry => entry.layer === layer);
      const ready = Promise.resolve(this.fetchBlock(step, layer)).then(inflated).then(bytes => {
        const numbers = unpacked(bytes, layout, this.images.length);
        if (this.waiting.get(key) === ready) this.keep(key, numbers, bytes.length); // else the run is another by now
        return numbers;
      }).finally(() => this.waiting.get(key) === ready && this.waiting.delete(key));
      this.waiting.set(key, ready);
    }
    return this.waiting.get(key);
  }

  keep(key, numbers, bytes) {
    this.kept.set(key, numbers);
    numbers.bytes = bytes;
    this.bytes += bytes;
    for (const [oldest, {bytes: freed}] of this.kept) {
      if (this.bytes <= MOST_BYTES || oldest === key) break;
      this.kept.delete(oldest);
      this.bytes -= freed;
    }
  }

  // One head's map of an image, or the mean of all (-1), (N,) float32; null where it is not here.
  map(at, role, layer, image, head) {
    const part = this.peek(at, layer)?.[role];
    if (!part || head >= part.heads) return null;
    if (head >= 0) return fromHalves(part.row(image, head).subarray(part.prefix));
    const mean = new Float32Array(part.tokens - part.prefix);
    for (let h = 0; h < part.heads; h++) {
      const row = fromHalves(part.row(image, h).subarray(part.prefix));
      for (let i = 0; i < mean.length; i++) mean[i] += row[i] / part.heads;
    }
    return mean;
  }

  // The weight of one patch in units of uniform attention, NaN where it is not here; of prefix tokens as it is.
  weight(at, role, layer, image, head, patch) {
    const part = this.peek(at, layer)?.[role], patches = part ? part.tokens - part.prefix : 0;
    return patch >= 0 && patch < patches && head < part.heads ? patches * tokenWeight(part, image, head, part.prefix + patch) : NaN;
  }

  prefixes(at, role, layer, image, head) {
    const part = this.peek(at, layer)?.[role];
    return Array.from({length: part?.prefix ?? 0}, (_, token) => tokenWeight(part, image, head, token));
  }
}

// Of one head, or of the mean over heads for -1.
function tokenWeight(part, image, head, token) {
  const heads = head >= 0 ? [head] : [...Array(part.heads).keys()];
  const weights = Uint16Array.from(heads, h => part.row(image, h)[token]);
  return fromHalves(weights).reduce((sum, weight) => sum + weight, 0) / heads.length;
}

// A block's parts by role, as views into it: see attn_monitor.player.blocks.
function unpacked(bytes, layout, images) {
  const count = layout.reduce((sum, e) => sum + images * (e.heads * tokensOf(e) + patchesOf(e) * e.features), 0);
  const halves = new Uint16Array(count);
  const colours = layout.reduce((sum, e) => sum + (e.colors ? 3 * images * patchesOf(e) : 0), 0);
  if (bytes.length !== 2 * count + colours) throw new Error("this snapshot has changed");
  for (let i = 0; i < count; i++) halves[i] = bytes[i] | bytes[count + i] << 8;
  let rowsAt = 0, coloursAt = 2 * count;
  let featuresAt = layout.reduce((sum, e) => sum + images * e.heads * tokensOf(e), 0);
  const parts = {};
  for (const entry of layout) {
    const {heads, prefix, features: width} = entry, tokens = tokensOf(entry), patches = patchesOf(entry);
    const [rows, features, colours] = [rowsAt, featuresAt, coloursAt];
    parts[entry.role] = {
      heads, prefix, tokens, width, grid: entry.grid,
      row: (image, head) => {
        const start = rows + (image * heads + head) * tokens;
        return halves.subarray(start, start + tokens);
      },
      features: image => {
        const start = features + image * patches * width;
        return width ? fromHalves(halves.subarray(start, start + patches * width)) : null;
      },
      colours: image => entry.colors
        ? bytes.subarray(colours + image * patches * 3, colours + (image + 1) * patches * 3) : null,
    };
    rowsAt += images * heads * tokens;
    featuresAt += images * patches * width;
    coloursAt += entry.colors ? images * patches * 3 : 0;
  }
  return parts;
}

const patchesOf = entry => entry.grid[0] * entry.grid[1];
const tokensOf = entry => entry.prefix + patchesOf(entry);

function unrolled(runs, count) {
  const mask = new Uint8Array(count);
  let at = 0;
  runs.forEach((length, i) => {
    if (i % 2) mask.fill(1, at, at + length);
    at += length;
  });
  return mask;
}

// The runs that lie in this file.
export function runsOfFile(manifest) {
  const text = document.getElementById("blocks").textContent;
  return manifest.runs.map(facts => new Run(facts, (step, layer) => {
    const [offset, length] = step.blocks[layer];
    return fromBase64(text.slice(offset, offset + length));
  }));
}

// The runs of the server that this page came from.
export class Server {
  async names() {
    return (await this.ask("runs")).runs;
  }

  async run(name) {
    const facts = await this.ask("run", {run: name});
    return new Run(facts, async (step, layer) => {
      const answer = await fetch(this.address("block", {run: name, step: step.step, layer}));
      if (!answer.ok) throw new Error(await answer.text());
      return new Uint8Array(await answer.arrayBuffer());
    });
  }

  // Steps that have come since; whether anything has changed.
  async refresh(run) {
    const after = run.steps.length ? run.steps[run.steps.length - 1].step : -1;
    const facts = await this.ask("run", {run: run.name, after, generation: run.generation});
    if (facts.generation !== run.generation) {
      run.replace(facts);
      return true;
    }
    run.pending = facts.pending;
    run.layouts = facts.layouts;
    run.steps.push(...facts.steps.filter(step => step.step > after));
    return facts.steps.length > 0;
  }

  async ask(what, parameters = {}) {
    const answer = await fetch(this.address(what, parameters));
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }

  address(what, parameters) {
    const query = new URLSearchParams(parameters).toString();
    return query ? `${what}?${query}` : what;
  }
}
