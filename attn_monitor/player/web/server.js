// The runs of the server that this page came from; see attn_monitor.player.server.
import { Run } from "./run.js";

/** @import {RunFacts, RunUpdate} from "./types" */

/**
 * @param {string} path
 * @param {Record<string, any>} parameters
 */
async function request(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  const response = await fetch(query ? `${path}?${query}` : path);
  if (!response.ok) throw new Error(await response.text());
  return response;
}

/** @returns {Promise<string[]>} */
export async function fetchNames() {
  return (await (await request("runs")).json()).runs;
}

/** @param {string} name */
export async function fetchRun(name) {
  /** @type {RunFacts} */
  const facts = await (await request("run", { run: name })).json();
  return new Run(facts, async (step, layer) => {
    const response = await request("block", { run: name, step: step.step, layer });
    return new Uint8Array(await response.arrayBuffer());
  });
}

/**
 * Fetch the steps that have come since.
 * @param {Run} run
 * @returns {Promise<boolean>} whether anything has changed
 */
export async function refresh(run) {
  const after = run.steps.at(-1)?.step ?? -1;
  const { generation } = run.facts;
  /** @type {RunFacts | RunUpdate} */
  const update = await (await request("run", { run: run.name, after, generation })).json();
  if (update.generation !== generation && "images" in update) {
    run.replace(update);
    return true;
  }
  run.append(update);
  return update.steps.length > 0;
}
