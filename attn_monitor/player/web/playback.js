// Plays the snapshots one after another.
import { requestDraw, shownIndex, shownLayer, shownSteps, showSnapshot, state, view } from "./view.js";

let nextAt = 0; // time of the next snapshot, in milliseconds

/** Play from here, or from the beginning where this is the end. */
export function togglePlay() {
  state.playing = !state.playing;
  if (state.playing && state.index === shownSteps().length - 1) showSnapshot(0);
  nextAt = performance.now();
  requestDraw();
  if (state.playing) requestAnimationFrame(playFrame);
}

function pause() {
  state.playing = false;
  requestDraw();
}

/** @param {number} time */
function playFrame(time) {
  if (!state.playing) return;
  const next = Math.min(state.index + 1, shownSteps().length - 1);
  const wanted = state.runs.map((run) => /** @type {const} */ ([run, shownIndex(run, shownSteps()[next])]));
  const missing = wanted.filter(([run, index]) => !run.cached(index, shownLayer(run, index)));
  if (missing.length) {
    for (const [run, index] of missing) run.load(index, shownLayer(run, index)).catch(pause);
  } else if (time >= nextAt) {
    nextAt = Math.max(nextAt + 1000 / view.speed, time - 1000 / view.speed);
    if (next === state.index) pause();
    else showSnapshot(next);
  }
  requestAnimationFrame(playFrame);
}
