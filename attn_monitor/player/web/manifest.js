// What Python sent with the page: runs, and the constants of its own pictures.
import { byId } from "./elements.js";

/** @import {Manifest} from "./types" */

/** @type {Manifest} */
export const manifest = JSON.parse(byId("manifest").textContent ?? "");

export const drawing = manifest.drawing;
