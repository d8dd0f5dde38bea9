// @ts-check
// What can be made of a video of the gallery, or of a file of the reader's own: a button for each.

import { api, of, on } from "./api.js";
import { paint } from "./brush.js";
import { ask } from "./dialog.js";

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));

/** What is worked on. id: of a video the server has; upload: of a file that was brought. size: its width and height.
 * frame: an address of its first frame. rate: its own frames a second.
 * @typedef {{id?: string, upload?: string, prompt: string, size: number[], frame: string | null, frames: number,
 *   rate: number, draft?: boolean}} Source */
/** @typedef {import("./dialog.js").Field} Field */
/** @typedef {import("./api.js").Work} Work */

/** @type {Field} */
const SECONDS = { name: "seconds", label: "Seconds to add", value: "1", kind: "number" };
/** @type {Field} */
const GAP = { ...SECONDS, label: "Seconds from the one to the other" };
/** @type {Field} */
const BACK = { ...SECONDS, label: "Seconds from its end back to its beginning" };
/** @type {Field} */
const STRENGTH = {
  name: "strength", label: "How much changes", value: "0.6", kind: "share",
  hint: "Near 0 it stays as it is, at 1 nothing of it is kept.",
};
/** @type {Field} */
const SCALE = { name: "scale", label: "Times as large", value: "2", kind: "number", least: 1.1 };

/** What is done with most videos; the rest is folded away. */
export const FIRST = new Set(["Remix", "Extend after", "Loop", "Refine", "Same again"]);
/** What a single picture has no use for. */
const OF_SEVERAL = new Set(["Loop", "New frames"]);

export class Works {
  /** @param {{say: (words: string) => void, fail: (error: unknown) => void, place: (source: Source) => void}} page
   * @param {(video: any) => void} put shows a job */
  constructor(page, put) {
    this.page = page;
    this.put = put;
    /** @type {Source | null} The first of two that are to be connected. */
    this.first = null;
  }

  /** @param {Source} source @returns {[string, () => any][]} */
  of(source) {
    const { id } = source;
    const clip = media(source), size = sizeOf(source);
    /** @type {Field} */
    const words = { name: "prompt", label: "Prompt", value: source.prompt, kind: "text" };
    /** @type {Field} */
    const missing = {
      name: "missing", label: "Which frames, such as 4-7,12", value: "", kind: "line", hint: `It has the frames 0 to ${source.frames - 1}.`,
    };
    const made = (/** @type {string} */ name, /** @type {Field[]} */ fields, /** @type {(given: any) => Work} */ work) =>
      /** @type {[string, () => any]} */ ([name, async () => this.begun(await ask(name, fields, work))]);
    /** @type {[string, () => any][]} */
    const all = [
      made("Extend after", [words, SECONDS], (given) => of("extensions", { ...given, ...size, video: clip })),
      made("Extend before", [words, SECONDS], ({ prompt, seconds }) =>
        of("extensions", { prompt, before_s: seconds, ...size, video: clip })),
      made("Loop", [words, BACK], ({ prompt, seconds }) => of("loop", { prompt, gap_s: seconds, ...size, video: clip })),
      made("Edit", [words, STRENGTH], (given) => of("edits", { ...given, ...size, video: clip })),
      made("New frames", [words, missing], (given) => of("edits", { ...given, ...size, video: clip })),
      ["To the time line", () => this.page.place(source)],
      ["Connect", () => this.connect(source)],
      ["Inpaint", () => this.inpaint(source)],
      made("Upscale", [words, SCALE], (given) => of("upscale", { ...given, video: clip })),
    ];
    if (id !== undefined) all.unshift(made("Remix", [words, STRENGTH], (given) => on(id, "remix", given)));
    if (id !== undefined && source.draft) all.push(made("Refine", [], () => on(id, "refine", {})));
    return all.filter(([name]) => source.frames > 1 || !OF_SEVERAL.has(name));
  }

  /** @param {any} job null where none was begun */
  begun(job) {
    if (!job) return;
    this.put(job);
    this.page.say("queued");
  }

  /** The same request once more, where the form does not hold all of it. @param {any} video @param {boolean} worded whether
   * the request has one prompt */
  async repeat(video, worded) {
    /** @type {Field[]} */
    const fields = [{ name: "seed", label: "Seed", value: String(video.seed), kind: "seed", hint: "The same seed makes the same video." }];
    if (worded) fields.unshift({ name: "prompt", label: "Prompt", value: video.prompt ?? "", kind: "text", spare: !video.prompt });
    this.begun(await ask("Same again", fields, (given) => on(video.id, "again", given)));
  }

  /** The first press picks the clip that leads, the second the one that it leads to. @param {Source} source */
  async connect(source) {
    const first = this.first, pick = $("pick");
    this.first = first ? null : source;
    pick.hidden = !this.first;
    document.body.classList.toggle("picking", !pick.hidden);
    for (const item of document.querySelectorAll(".leads")) item.classList.remove("leads");
    if (!first) {
      $("pick-words").textContent = `Which one is to follow “${source.prompt || "it"}”?`;
      document.querySelector(`[data-id="${source.id ?? source.upload}"]`)?.classList.add("leads");
      return;
    }
    if (same(first, source)) return;
    /** @type {Field} */
    const words = { name: "prompt", label: "Prompt", value: first.prompt, kind: "text" };
    this.begun(await ask("Connect", [words, GAP], ({ prompt, seconds }) =>
      of("connect", { prompt, gap_s: seconds, ...sizeOf(first), first: media(first), second: media(source) })));
  }

  /** Nothing is to be connected after all. */
  unpick() {
    if (this.first) this.connect(this.first);
  }

  /** @param {Source} source */
  async inpaint(source) {
    if (!source.frame) throw new Error("the browser cannot show this file, so nothing can be painted on it");
    const work = async (/** @type {Blob} */ mask, prompt = source.prompt) => {
      const kept = await api.upload(mask, "mask.png");
      return of("edits", { prompt, ...sizeOf(source), video: media(source), mask: { upload: kept.id } });
    };
    this.begun(await paint({
      picture: source.frame, size: source.size, prompt: source.prompt, foresee: work,
      begin: async (mask, prompt) => api.make(await work(mask, prompt)),
    }));
  }
}

/** @param {Source} a @param {Source} b */
const same = (a, b) => (a.id ?? a.upload) === (b.id ?? b.upload);

/** A source as the server takes it. @param {Source} source */
export const media = (source) => (source.id === undefined ? { upload: source.upload } : { video_id: source.id });

/** What is made of a video has its size; of a file, the size that the model makes of it. @param {Source} source */
const sizeOf = ({ id, size }) => (id === undefined ? {} : { size: size.join("x") });
