// What Python sends to the page; see attn_monitor.player.blocks, .contents and .constants.

/** Rows first, then columns. */
export type Pair = [number, number];
export type Colour = [number, number, number];

/** One layer of one role in a snapshot. */
export interface Layer {
  role: string;
  layer: number;
  name: string;
  model: string;
  query: string;
  places: string;
  kind: string;
  mixed: boolean;
  /** Names of the tokens before the patches. */
  prefix: string[];
  grid: Pair;
  /** Names of the two axes, such as h and w, or f and t. */
  axes: string[];
  geometry: { origin: Pair; cell: Pair; margin: number[] } | null;
  heads: number;
  colors: boolean;
  features: number;
  /** Patches whose own attention is in the block, in ascending order. */
  queries: number[];
  /** Made on the page, see Run.layout. */
  patchGrid: PatchGrid;
}

export interface Flag {
  step: number;
  layer: number | null;
  heads: number[];
  words: string;
}

export interface Verdict {
  state: string;
  since: number | null;
  evidence: string[];
  advice: string;
}

export interface Step {
  step: number;
  epoch: number;
  /** By "role/layer/metric", or "role/model/metric": the mean, then each head. */
  metrics: Record<string, (number | null)[]>;
  flags: Flag[];
  /** What has become of the run so far; null where it was not judged. */
  verdict: Verdict | null;
  layout: number;
  /** Offset and length of each layer's block in the file, by layer. */
  blocks: Record<number, Pair>;
}

export interface RunFacts {
  name: string;
  images: { name: string; photo: string; truth: number[][] }[];
  /** What the photographs are, with the bands or frames that they show. */
  caption: string;
  /** Names of the pictures of each image of clips and volumes, which `images` lists one after another; else none. */
  pictures: string[];
  size: Pair;
  probe: string;
  note: string;
  layouts: Layer[][];
  steps: Step[];
  generation?: string;
  pending?: number;
  /** What attn-monitor leaderboard found: a verdict, steps to pick, and the score of the first one. */
  found?: { verdict: string; dense: number | null; certainty: string; global: number | null; pick: number | null };
}

/** What a server answers about a run that the page has already: new steps only, unless the generation differs. */
export type RunUpdate = Pick<RunFacts, "name" | "note" | "layouts" | "steps" | "generation" | "pending">;

export interface Drawing {
  opacity: Pair;
  grey: number;
  unseen: { brightness: number; line: Colour };
  mask: Colour;
  truth: Colour;
  missing: Colour;
  practically_uniform: number;
  uniform_range: Pair;
  scales: Record<string, { ticks: string[]; unit: string }>;
  difference: { range: number; ticks: string[]; opacity: Pair; brightness: number; colours: [Colour, Colour] };
  tables: Record<string, string>;
  threshold: number;
  scale: string;
  table: string;
}

export interface Manifest {
  server?: boolean;
  /** Where the page is opened as a list of its runs: metrics that are shown first, and which values. */
  list?: { columns: string[]; at: string };
  runs: RunFacts[];
  drawing: Drawing;
}

/** Where the patches of a grid lie in an image, in pixels of the image. */
export interface PatchGrid {
  shape: Pair;
  origin: Pair;
  cell: Pair;
  /** How far patches see beyond the outermost cells on each axis; empty where they do not overlap. */
  margin: number[];
  size: Pair;
}

/** A patch of an image, as an index into a grid. */
export interface PatchRef {
  image: number;
  patch: number;
  patchGrid: PatchGrid;
  /** The tile below the pointer. */
  tile?: import("./tile.js").Tile;
}

/** What a link restores. */
export interface View {
  step: number | null;
  image: number;
  all: boolean;
  layer: number | null;
  head: number;
  arrange: string;
  sort: string;
  show: string;
  opacity: number;
  scale: string;
  table: string;
  mask: boolean;
  truth: boolean;
  threshold: number;
  compare: string;
  swipe: number;
  metric: string;
  speed: number;
  pin: number;
  theme: string;
  run: string | null;
  other: string | null;
  /** Whether the list of all runs is shown, sorted by a column (descending, with "-" ascending). */
  list: boolean;
  by: string;
  at: string;
  columns: string;
}

/** A column of the stage: a role of one run, or of two that are drawn on one canvas. */
export interface Column {
  title: string;
  role: string;
  runs: import("./run.js").Run[];
  /** 0 for A and 1 for B where the two stand side by side. */
  side?: number;
}

/** A curve of a chart: values that are null leave a gap. */
export interface Curve {
  className: string;
  points: [number, number | null][];
  /** Whether the value at the shown step is marked. */
  dotted: boolean;
}
