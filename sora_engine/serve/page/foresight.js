// @ts-check
// What a work would take, told before it is begun.

import { api } from "./api.js";

/** @typedef {import("./api.js").Work} Work */

const SOON_MS = 300;
/** What is told until the first answer. */
const ASKED = "Working out what it takes …";

/** @param {number} seconds */
export const time = (seconds) =>
  seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`;

/** A length as people say it. @param {number|string} seconds */
export const span = (seconds) => `${Number(Number(seconds).toFixed(1))} s`;

const memory = (/** @type {number} */ mib) => (mib < 1000 ? `${Math.round(mib)} MiB` : `${(mib / 1024).toFixed(1)} GiB`);

/** A plan in words. @param {any} told */
export function promised(told) {
  return [
    told.size ? `${told.size}, ${span(told.seconds)}` : "",
    `${told.num_steps} steps`,
    told.peak_memory_mb == null ? "" : `${memory(told.peak_memory_mb)} of memory promised`,
    told.eta_s == null ? "" : `about ${time(told.eta_s)}`,
    told.queue_position ? `${told.queue_position} before it` : "",
  ].filter(Boolean).join(", ");
}

/** Asks for plans as a form changes, and shows the last one's answer. */
export class Foresight {
  /** @param {HTMLElement} place where it is told @param {() => Work | null | Promise<Work | null>} wanted null where nothing can be asked yet
   * @param {{failed: (error: unknown) => void, went: () => void}} heard */
  constructor(place, wanted, heard) {
    this.place = place;
    this.wanted = wanted;
    this.heard = heard;
    this.timer = 0;
    this.asked = 0;
  }

  soon() {
    window.clearTimeout(this.timer);
    this.timer = window.setTimeout(() => this.now(), SOON_MS);
  }

  async now() {
    const mine = ++this.asked;
    try {
      const work = await this.wanted();
      if (mine !== this.asked) return;
      if (work && !this.place.textContent) this.place.textContent = ASKED;
      const told = work ? promised(await api.plan(work)) : "";
      if (mine !== this.asked) return; // another was asked for since
      this.place.textContent = told;
      this.heard.went();
    } catch (error) {
      if (mine !== this.asked) return;
      this.place.textContent = "";
      this.heard.failed(error);
    }
  }

  /** What is still on its way is not shown. */
  stop() {
    window.clearTimeout(this.timer);
    this.asked++;
    this.place.textContent = "";
  }
}
