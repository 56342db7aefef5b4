// What the words and numbers of the page mean, and its keys.
import { el } from "./elements.js";

/** @type {[string, string][]} */
const WORDS = [
  ["× uniform", "1 is what every patch would get if attention were spread evenly; 32× is bright yellow."],
  ["entropy, H", "How widely attention is spread: 1 evenly over all patches, 0 on a single one."],
  ["mask", "The fewest patches that hold “Mask mass” of the attention, outlined. Uniform attention has none."],
  ["IoU", "Overlap of the mask with ground truth: 1 if they are equal, 0 if they do not meet."],
  ["peak", "The largest weight of a patch, × uniform."],
  ["CLS, registers", "Tokens that are no patch; the card shows how much attention stays with them."],
  ["of patch", "What the pinned patch itself attends to, in pages of a model: show --player, attention_player."],
  ["PCA", "Features of patches as colours: like colour, like feature, in all images and steps."],
  ["cosine", "How alike the features of the pinned patch and of each other patch are: 1 the same direction."],
  ["attention moved", "Of B − A: half the sum of all differences, so 100 % if nothing is where it was."],
  ["verdict", "Judged from the metrics of all snapshots so far. It opens, and says why and what people do about it."],
];

/** @type {[string, string][]} */
const KEYS = [
  ["← →", "one snapshot back or forward"],
  ["Home End", "first or last snapshot"],
  ["space", "play or pause"],
  ["[ ]", "another image"],
  [", .", "another frame or slice, of clips and volumes"],
  ["a", "all images"],
  ["m", "mask outline"],
  ["Shift + ← ↑ → ↓", "move from patch to patch"],
  ["Enter", "pin the patch, or unpin it"],
  ["Esc", "unpin"],
  ["?", "this list"],
];

/** @returns {{element: HTMLDialogElement, open: () => void}} */
export function makeHelp() {
  const close = el("button", { type: "button", onclick: () => element.close() }, "Close");
  const header = el("header", {}, el("h2", { id: "help-title" }, "Words and keys"), close);
  const hint = "Hover over a map or tap it to read a patch; a click pins it. Tap a head to enlarge it.";
  const element = el(
    "dialog",
    { class: "help", "aria-labelledby": "help-title" },
    header,
    el("p", {}, hint),
    listOf(WORDS, (word) => word),
    listOf(KEYS, (keys) => el("kbd", {}, keys)),
  );
  element.addEventListener("click", (event) => event.target === element && element.close()); // beside it
  return { element, open: () => element.showModal() };
}

/**
 * @param {[string, string][]} entries
 * @param {(name: string) => Node | string} nameOf
 */
function listOf(entries, nameOf) {
  return el("dl", {}, ...entries.flatMap(([name, text]) => [el("dt", {}, nameOf(name)), el("dd", {}, text)]));
}
