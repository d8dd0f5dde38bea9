// @ts-check
// Jobs in the making, and finished videos with what can be done with them.

import { api } from "./api.js";
import { paint } from "./brush.js";

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const MOST_STREAMS = 3;
/** A small model makes dozens of steps a second, and each preview is decoded for who asks. */
const PREVIEW_MS = 400;
/** What is done with most videos; the rest is folded away. */
const FIRST = new Set(["Remix", "Extend after", "Loop", "Refine", "Same again"]);

/** @param {any} video */
export function stageWords(video) {
  if (video.status === "queued") {
    if (video.queue_position == null) return "waiting";
    return video.queue_position ? `waiting, ${video.queue_position} before it` : "waiting, it is next";
  }
  if (video.stage === "denoising") return `step ${video.steps_done} of ${video.num_steps}`;
  if (video.stage === "decoding") return `frame ${video.frames_decoded} of ${video.num_frames}`;
  return video.stage;
}

/** @param {number} seconds */
export const time = (seconds) =>
  seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`;

/** What a file's credentials come to, in a sentence. @param {any} found */
export function signed(found) {
  if (!found || found.state === "unread") return "";
  if (found.state === "absent") return "Not signed: nothing in the file says where it comes from.";
  if (found.state === "invalid") return `Its credentials are not valid: ${found.problems.join("; ")}`;
  const from = found.ingredients.map((/** @type {any} */ one) =>
    (one.signer ? `a clip signed by ${one.signer}` : "a clip without credentials")).join(" and ");
  return `Signed by ${found.signer}, and unaltered since${from ? `; made from ${from}` : ""}.`;
}

export class Gallery {
  /** @param {{say: (words: string) => void, fail: (error: unknown) => void,
   *   again: (video: any) => Promise<void>, place: (video: any) => void, most: () => number}} page most: the highest priority. */
  constructor(page) {
    this.page = page;
    /** @type {Map<string, {item: HTMLElement, stream: EventSource|null, step: number, next: number}>} */
    this.jobs = new Map();
    /** @type {Map<string, HTMLElement>} */
    this.shown = new Map();
    /** @type {any} */
    this.first = null;
    this.last = null;
  }

  async refresh() {
    const page = await api.list();
    for (const video of [...page.data].reverse()) this.put(video);
    const there = new Set(page.data.map((/** @type {any} */ video) => video.id));
    const missing = page.missing_replicas ?? [];
    for (const name of this.jobs.keys()) {
      if (there.has(name)) continue;
      const told = await api.video(name).catch((error) => { if (error.status !== 404 && !missing.length) throw error; });
      if (told) this.put(told);
      else if (!missing.length) this.drop(name);
    }
    this.lacks(missing.length ? `not all is shown: no answer from ${missing.length === 1 ? "server" : "servers"} ${missing.join(", ")}` : "");
    if (this.last === null) this.more(page);
    this.line(page.data);
    this.empty();
  }

  /** Shows the jobs in the order in which they are made. @param {any[]} videos */
  line(videos) {
    const place = new Map(videos.map((one) => [one.id, one.status === "queued" ? 1 + (one.queue_position ?? 0) : 0]));
    const items = /** @type {HTMLElement[]} */ ([...$("queue").children]);
    const wanted = [...items].sort((a, b) => (place.get(a.dataset.id) ?? 0) - (place.get(b.dataset.id) ?? 0));
    if (wanted.some((item, n) => item !== items[n])) { // moving a button takes its focus away
      const focus = document.activeElement;
      $("queue").append(...wanted);
      if (focus instanceof HTMLElement && $("queue").contains(focus)) focus.focus();
    }
  }

  /** What is wrong with the list, beside it; "" for nothing. @param {string} words */
  lacks(words) {
    if ($("link").textContent !== words) $("link").textContent = words;
  }

  async older() {
    const page = await api.list(this.last);
    for (const video of page.data) this.put(video, true);
    this.more(page);
  }

  /** @param {any} page */
  more(page) {
    this.last = page.last_id;
    $("older").hidden = !page.has_more;
  }

  empty() {
    $("no-queue").hidden = this.jobs.size > 0;
    $("no-gallery").hidden = this.shown.size > 0;
  }

  /** @param {any} video @param {boolean} [atEnd] */
  put(video, atEnd = false) {
    if (video.status === "queued" || video.status === "in_progress") this.working(video);
    else {
      if (this.jobs.has(video.id)) {
        const failed = video.error && video.error.code !== "cancelled";
        this.page.say(failed ? `failed: ${video.error.message}` : video.error ? "cancelled" : "done");
        this.drop(video.id);
      }
      if (video.error?.code !== "cancelled") this.finished(video, atEnd);
    }
    this.empty();
  }

  /** @param {string} name */
  drop(name) {
    const job = this.jobs.get(name);
    job?.stream?.close();
    job?.item.remove();
    this.jobs.delete(name);
  }

  /** @param {any} video */
  working(video) {
    let job = this.jobs.get(video.id);
    if (!job) {
      const item = $("queue-item").content.firstElementChild.cloneNode(true);
      item.dataset.id = video.id;
      item.querySelector(".cancel").onclick = () =>
        api.cancel(video.id).then((told) => this.put(told)).catch(this.page.fail);
      for (const [name, by] of [["sooner", 1], ["later", -1]]) {
        item.querySelector(`.${name}`).onclick = () => this.turn(video.id, Number(item.dataset.priority) + Number(by));
      }
      $("queue").append(item);
      job = { item, stream: null, step: 0, next: 0 };
      this.jobs.set(video.id, job);
    }
    if (!job.stream && [...this.jobs.values()].filter((one) => one.stream).length < MOST_STREAMS) {
      this.follow(video.id, job);
    }
    const item = /** @type {any} */ (job.item), words = stageWords(video);
    item.querySelector(".words").textContent = video.prompt ?? "";
    item.querySelector("progress").value = video.progress;
    item.querySelector("progress").setAttribute("aria-label", `Progress of ${video.prompt ?? "a video"}`);
    item.dataset.priority = String(video.priority);
    item.querySelector("progress").hidden = video.status === "queued";
    item.querySelector(".turn").hidden = video.status !== "queued";
    item.querySelector(".sooner").disabled = video.priority >= this.page.most();
    item.querySelector(".later").disabled = video.priority <= -8;
    const left = video.eta_s == null ? "" : `, about ${time(video.eta_s)} left`;
    item.querySelector(".stage").textContent = `${words}${left}; ${video.size}, ${video.seconds} s, seed ${video.seed}${video.priority ? `, priority ${video.priority}` : ""}`;
    this.page.say(words);
    if (video.stage === "denoising" && video.steps_done > job.step && Date.now() > job.next) {
      Object.assign(job, { step: video.steps_done, next: Date.now() + PREVIEW_MS });
      this.preview(video, item.querySelector("img"));
    }
  }

  /** Lets a job go before or behind the others. @param {string} name @param {number} priority */
  async turn(name, priority) {
    try {
      const told = await api.turn(name, priority);
      this.put(told);
      this.page.say(told.priority === priority ? `priority ${priority}` : "it has begun already");
      await this.refresh();
    } catch (error) {
      this.page.fail(error);
    }
  }

  /** @param {any} video @param {HTMLImageElement} picture */
  async preview(video, picture) {
    const answer = await fetch(api.preview(video.id, video.steps_done)).catch(() => null);
    if (!answer?.ok) return; // the model has none, or the step has passed
    const old = picture.src;
    picture.src = URL.createObjectURL(await answer.blob());
    picture.alt = `Preview at ${stageWords(video)}`;
    picture.hidden = false;
    if (old.startsWith("blob:")) URL.revokeObjectURL(old);
  }

  /** @param {string} name @param {{stream: EventSource|null}} job */
  follow(name, job) {
    const stream = api.events(name);
    job.stream = stream;
    const told = (/** @type {MessageEvent} */ event) => this.put(JSON.parse(event.data));
    stream.addEventListener("progress", told);
    stream.addEventListener("done", (event) => { stream.close(); told(event); });
    stream.onerror = () => {
      if (stream.readyState === EventSource.CLOSED) job.stream = null; // the list tells on
    };
  }

  /** @param {any} video @param {boolean} atEnd */
  finished(video, atEnd) {
    if (this.shown.has(video.id)) return;
    const item = $("gallery-item").content.firstElementChild.cloneNode(true);
    item.dataset.id = video.id;
    const film = item.querySelector("video");
    const failed = video.status === "failed";
    if (failed) {
      film.remove();
      item.classList.add("failed");
      item.querySelector(".warn").textContent = `It failed: ${video.error?.message ?? "no reason is known"}`;
      item.querySelector(".warn").hidden = false;
    } else {
      film.src = api.content(video.id, "video");
      film.poster = api.content(video.id, "thumbnail");
    }
    film.setAttribute("aria-label", video.prompt ?? "a video");
    film.muted = true;
    film.autoplay = !still.matches;
    item.querySelector(".words").textContent = video.prompt ?? "";
    const took = video.inference_time_s == null ? "" : `, took ${time(video.inference_time_s)}`;
    item.querySelector(".facts").textContent = `${video.size}, ${video.seconds} s, seed ${video.seed}${took}`;
    const actions = item.querySelector(".actions"), more = item.querySelector(".more .actions");
    const all = this.actions(video);
    for (const [name, act] of failed ? all.filter(([name]) => name === "Same again" || name === "Delete") : all) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.onclick = () => Promise.resolve(act()).catch(this.page.fail);
      (failed || FIRST.has(name) ? actions : more).append(button);
    }
    const download = document.createElement("a");
    download.href = api.content(video.id, "video");
    download.download = `${video.id}.mp4`;
    download.textContent = "Download";
    if (!failed) actions.append(download);
    item.querySelector(".more").hidden = failed;
    const details = item.querySelector(".made");
    details.ontoggle = async () => {
      const text = details.querySelector("pre");
      if (!details.open || text.textContent) return;
      const read = (/** @type {Promise<any>} */ answer) => answer.catch(() => null);
      const [request, credentials] = await Promise.all([
        read(api.request(video.id)), failed ? null : read(api.credentials(video.id)),
      ]);
      details.querySelector(".signed").textContent = signed(credentials);
      text.textContent = JSON.stringify({ request, receipt: video.receipt, credentials }, null, 1);
    };
    this.shown.set(video.id, item);
    if (atEnd) $("gallery").append(item);
    else $("gallery").prepend(item);
  }

  /** @param {any} video @returns {[string, () => any][]} */
  actions(video) {
    const source = { video_id: video.id };
    const start = (/** @type {Promise<any>} */ job) => job.then((told) => { this.put(told); this.page.say("queued"); });
    const words = { name: "prompt", label: "Prompt", value: video.prompt ?? "" };
    const seconds = { name: "seconds", label: "Seconds", value: "1", number: true };
    const strength = { name: "strength", label: "How much changes, from 0 to 1", value: "0.6", number: true };
    const ask = async (/** @type {string} */ name, /** @type {any[]} */ fields, /** @type {(given: any) => Promise<any>} */ act) => {
      const given = await question(name, fields);
      if (given) await start(act(given));
    };
    return [
      ["Remix", () => ask("Remix", [words], (given) => api.work(video.id, "remix", given))],
      ["Extend after", () => ask("Extend after", [words, seconds], (given) => api.extend({ ...given, video: source }))],
      ["Extend before", () => ask("Extend before", [words, seconds], ({ prompt, seconds: before_s }) =>
        api.extend({ prompt, before_s, video: source }))],
      ["Loop", () => ask("Loop", [words, seconds], ({ prompt, seconds: gap_s }) => api.work(video.id, "loop", { prompt, gap_s }))],
      ["Edit", () => ask("Edit", [words, strength], (given) => api.edit({ ...given, video: source }))],
      ["New frames", () => ask("New frames", [words, { name: "missing", label: "Which, such as 4-7,12", value: "", text: true }],
        (given) => api.edit({ ...given, video: source }))],
      ["To the time line", () => this.page.place(video)],
      ["Connect", () => this.connect(video, ask, words, seconds)],
      ["Inpaint", () => this.inpaint(video, source, start)],
      ["Upscale", () => ask("Upscale", [{ name: "scale", label: "Times as large", value: "2", number: true }],
        (given) => api.work(video.id, "upscale", given))],
      ...(video.draft ? [/** @type {[string, () => any]} */ (["Refine", () => start(api.work(video.id, "refine", {}))])] : []),
      ["Same again", () => this.page.again(video)],
      ["Delete", () => this.remove(video)],
    ];
  }

  /** The first press picks the clip that leads, the second the one that it leads to.
   * @param {any} video @param {any} ask @param {any} words @param {any} seconds */
  async connect(video, ask, words, seconds) {
    const pick = $("pick");
    if (!this.first || this.first.id === video.id) {
      this.first = this.first ? null : video;
      pick.hidden = !this.first;
      pick.textContent = "Connect: now press Connect at the video that it is to lead to.";
      return;
    }
    const first = this.first;
    this.first = null;
    pick.hidden = true;
    await ask("Connect", [words, seconds], (/** @type {any} */ given) =>
      api.connect({ prompt: given.prompt, gap_s: given.seconds, first: { video_id: first.id }, second: { video_id: video.id } }));
  }

  /** @param {any} video @param {object} source @param {(job: Promise<any>) => Promise<void>} start */
  async inpaint(video, source, start) {
    const [width, height] = video.size.split("x").map(Number);
    const painted = await paint(api.content(video.id, "thumbnail"), width, height, video.prompt ?? "");
    if (!painted) return this.page.say("nothing was painted");
    const mask = await api.upload(painted.mask, "mask.png");
    await start(api.edit({ prompt: painted.prompt, video: source, mask: { upload: mask.id } }));
  }

  /** @param {any} video */
  async remove(video) {
    await api.remove(video.id);
    this.shown.get(video.id)?.remove();
    this.shown.delete(video.id);
    this.empty();
    this.page.say("deleted");
  }
}

/** A dialog with a few fields. @param {string} name @param {any[]} fields @returns {Promise<any>} */
function question(name, fields) {
  const dialog = $("ask"), place = $("ask-fields");
  $("ask-name").textContent = name;
  $("ask-yes").textContent = name;
  place.replaceChildren();
  for (const field of fields) {
    const label = document.createElement("label");
    const input = document.createElement(field.number || field.text ? "input" : "textarea");
    label.textContent = field.label;
    input.name = field.name;
    input.value = field.value;
    input.required = true;
    if (field.number) Object.assign(input, { type: "number", min: "0.1", step: "any" });
    label.append(input);
    place.append(label);
  }
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue !== "yes" ? null : Object.fromEntries(
      fields.map((field) => {
        const value = place.querySelector(`[name=${field.name}]`).value;
        return [field.name, field.number ? Number(value) : value];
      })));
  });
}
