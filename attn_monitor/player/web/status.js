// Messages in the header of the page.
import { byId } from "./elements.js";
import { manifest } from "./manifest.js";

const SHOWN_FOR = 6000; // milliseconds

let timer = 0;

/** @param {string} message */
export function showStatus(message) {
  byId("status").textContent = message;
  clearTimeout(timer);
  if (message) timer = setTimeout(() => showStatus(""), SHOWN_FOR);
}

/**
 * Show an error, in place of the page where that is not there yet.
 * @param {unknown} error
 */
export function showError(error) {
  const message = error instanceof Error ? error.message : String(error);
  if (byId("app").hidden) byId("loading").textContent = message;
  else showStatus(message);
  if (!manifest.server) throw error; // a server may be away for a while
}
