// Plays the snapshots one after another.
import { requestDraw, runA, shownLayer, showSnapshot, state, view } from "./view.js";

let nextAt = 0; // time of the next snapshot, in milliseconds

/** Play from here, or from the beginning where this is the end. */
export function togglePlay() {
  state.playing = !state.playing;
  if (state.playing && state.index === runA().steps.length - 1) showSnapshot(0);
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
  const run = runA();
  const next = Math.min(state.index + 1, run.steps.length - 1);
  const layer = shownLayer(run, next);
  if (!run.cached(next, layer)) {
    run.load(next, layer).catch(pause);
  } else if (time >= nextAt) {
    nextAt = Math.max(nextAt + 1000 / view.speed, time - 1000 / view.speed);
    if (next === state.index) pause();
    else showSnapshot(next);
  }
  requestAnimationFrame(playFrame);
}
