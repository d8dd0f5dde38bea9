// @ts-check
// Files of the reader's own, to be worked on as videos are. They are here until the page is left.

import { api } from "./api.js";
import { span } from "./foresight.js";
import { plays } from "./gallery.js";
import { firstFrame, keep } from "./media.js";

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));

/** What people bring files for. */
const FIRST = new Set(["Edit", "Inpaint", "Extend after", "Loop"]);

/** Sends a file, and shows it among the videos. @param {File} file @param {import("./gallery.js").Gallery} gallery */
export async function bring(file, gallery) {
  const found = await sent(file);
  if (document.querySelector(`#gallery [data-id="${found.id}"]`)) return; // it is there
  const item = $("gallery-item").content.firstElementChild.cloneNode(true);
  const film = item.querySelector("video"), picture = found.num_frames === 1;
  item.classList.add("own");
  if (picture) {
    const shown = document.createElement("img");
    Object.assign(shown, { width: found.width, height: found.height, src: found.frame ?? "", alt: file.name });
    film.replaceWith(shown);
  } else {
    Object.assign(film, { width: found.width, height: found.height, src: URL.createObjectURL(file) });
    plays(film, file.name);
  }
  item.querySelector(".words").textContent = file.name;
  const long = picture ? "a picture" : span(found.num_frames / found.fps);
  item.querySelector(".facts").textContent = `Yours: ${found.width}x${found.height}, ${long}`;
  /** @type {import("./works.js").Source} */
  const source = {
    upload: found.id, prompt: "", size: [found.width, found.height], frames: found.num_frames, rate: found.fps, frame: found.frame,
  };
  gallery.fill(item, found.id, source, [...gallery.works.of(source), ["Take away", () => { item.remove(); gallery.empty(); }]], FIRST);
  item.querySelector(".made").remove();
  $("gallery").prepend(item);
  gallery.empty();
  item.scrollIntoView({ block: "nearest" });
  item.querySelector("button").focus();
}

/** Sends a file; what the server found in it, and its first frame. @param {File} file */
export async function sent(file) {
  const [found, frame] = await Promise.all([api.upload(file, file.name), firstFrame(file)]);
  keep(found.id, frame);
  return { ...found, frame };
}
