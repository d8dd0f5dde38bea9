// @ts-check
// Jobs in the making, and finished videos with what can be done with them.

import { api } from "./api.js";
import { span, time } from "./foresight.js";
import { FIRST, Works } from "./works.js";

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const MOST_STREAMS = 3;
/** A small model makes dozens of steps a second, and each preview is decoded for who asks. */
const PREVIEW_MS = 400;
/** How long a video that was deleted can be had back. */
const UNDO_MS = 20_000;

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

const KINDS = {
  extend: "Extended", loop: "Loop", connect: "Connected", edit: "Edited", inpaint: "Inpainted", fill: "With new frames",
  upscale: "Upscaled",
};

/** What was done, where it is more than a video from words. @param {any} video */
function kind(video) {
  const name = video.draft ? "Draft" : video.remixed_from_video_id ? "Remix" : KINDS[/** @type {keyof typeof KINDS} */ (video.task)];
  return name ? `${name}: ` : "";
}

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
  /** @param {{say: (words: string) => void, stand: (words: string) => void, fail: (error: unknown) => void,
   *   again: (video: any) => Promise<void>, place: (source: any) => void, most: () => number, ended: () => void}} page
   *   say: tells what happened; stand: how it stands, "" for nothing; most: the highest priority; ended: a job is over. */
  constructor(page) {
    this.page = page;
    this.works = new Works(page, (job) => this.begun(job));
    /** @type {Map<string, {item: HTMLElement, stream: EventSource|null, step: number, next: number, words: string}>} */
    this.jobs = new Map();
    /** @type {Map<string, HTMLElement>} */
    this.shown = new Map();
    /** @type {Set<string>} Jobs that are over: a list that was on its way meanwhile does not bring them back. */
    this.over = new Set();
    /** @type {Map<string, number>} Videos that are deleted once their time is over. */
    this.leaving = new Map();
    this.last = null;
    window.addEventListener("pagehide", () => {
      for (const name of this.leaving.keys()) api.remove(name, true).catch(() => {});
    });
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
    this.stand();
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
    $("no-gallery").hidden = $("gallery").children.length > 0;
  }

  /** Tells at the head of the page how the jobs stand. */
  stand() {
    const all = [...this.jobs.values()].map((job) => job.words), more = all.length - 1;
    const first = all.find((words) => !words.startsWith("waiting")) ?? all[0] ?? "";
    this.page.stand(first && more ? `${first}, and ${more} more` : first);
  }

  /** Shows a job that the reader has begun, and brings it into sight. @param {any} video */
  begun(video) {
    this.put(video);
    const there = this.jobs.get(video.id)?.item ?? this.shown.get(video.id);
    there?.scrollIntoView({ block: "nearest" });
  }

  /** @param {any} video @param {boolean} [atEnd] */
  put(video, atEnd = false) {
    if (video.status === "queued" || video.status === "in_progress") {
      if (!this.over.has(video.id)) this.working(video);
    } else {
      this.over.add(video.id);
      const job = this.jobs.get(video.id), watched = job && watches(job.item);
      if (job) {
        const failed = video.error && video.error.code !== "cancelled";
        this.page.say(failed ? `failed: ${video.error.message}` : video.error ? "cancelled" : `done: ${video.prompt ?? "a video"}`);
        this.drop(video.id);
        this.page.ended();
      }
      if (video.error?.code !== "cancelled") this.finished(video, atEnd);
      if (watched) this.shown.get(video.id)?.scrollIntoView({ block: "nearest" });
    }
    this.empty();
    this.stand();
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
      job = { item, stream: null, step: 0, next: 0, words: "" };
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
    item.querySelector(".stage").textContent = `${words}${left}; ${video.size}, ${span(video.seconds)}, seed ${video.seed}${video.priority ? `, priority ${video.priority}` : ""}`;
    job.words = words;
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
    const failed = video.status === "failed", film = item.querySelector("video");
    if (failed) {
      film.remove();
      item.classList.add("failed");
      item.querySelector(".warn").textContent = `It failed: ${video.error?.message ?? "no reason is known"}`;
      item.querySelector(".warn").hidden = false;
    } else {
      [film.width, film.height] = video.size.split("x").map(Number); // its place is kept while it loads
      film.src = api.content(video.id, "video");
      film.poster = api.content(video.id, "thumbnail");
      plays(film, video.prompt);
    }
    item.querySelector(".words").textContent = video.prompt ?? "";
    const took = video.inference_time_s == null ? "" : `, took ${time(video.inference_time_s)}`;
    item.querySelector(".facts").textContent = `${kind(video)}${video.size}, ${span(video.seconds)}, seed ${video.seed}${took}`;
    /** @type {[string, () => any][]} */
    const last = [["Same again", () => this.page.again(video)], ["Delete", () => this.remove(video)]];
    const download = document.createElement("a");
    download.href = api.content(video.id, "video");
    download.download = `${video.id}.mp4`;
    download.textContent = "Download";
    const source = failed ? null : sourceOf(video);
    this.fill(item, video.id, source, [...(source ? this.works.of(source) : []), ...last]);
    if (failed) item.querySelector(".more").hidden = true;
    else item.querySelector(".actions").append(download);
    const details = item.querySelector(".made");
    details.ontoggle = () => { if (details.open) this.tell(video, details); };
    this.shown.set(video.id, item);
    if (atEnd) $("gallery").append(item);
    else $("gallery").prepend(item);
  }

  /** Gives an item its buttons. @param {any} item @param {string} id @param {import("./works.js").Source | null} source
   * @param {[string, () => any][]} all @param {Set<string>} shown those that are not folded away */
  fill(item, id, source, all, shown = FIRST) {
    item.dataset.id = id;
    const first = item.querySelector(".actions"), more = item.querySelector(".more .actions");
    for (const [name, act] of all) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.onclick = () => Promise.resolve().then(act).catch(this.page.fail);
      (!source || shown.has(name) ? first : more).append(button);
    }
    const follow = item.querySelector(".follow");
    if (source) follow.onclick = () => this.works.connect(source).catch(this.page.fail);
    else follow.remove();
  }

  /** How a video was made. @param {any} video @param {HTMLElement} place */
  async tell(video, place) {
    const text = /** @type {HTMLElement} */ (place.querySelector("pre"));
    if (text.textContent) return;
    const read = (/** @type {Promise<any>} */ answer) => answer.catch(() => null);
    const failed = video.status === "failed";
    const [request, credentials] = await Promise.all([
      read(api.request(video.id)), failed ? null : read(api.credentials(video.id)),
    ]);
    /** @type {HTMLElement} */ (place.querySelector(".signed")).textContent = signed(credentials);
    text.textContent = JSON.stringify({ request, receipt: video.receipt, credentials }, null, 1);
  }

  /** Takes a video away; until its time is over it can be had back. @param {any} video */
  remove(video) {
    const item = /** @type {HTMLElement} */ (this.shown.get(video.id));
    const gone = $("gone-item").content.firstElementChild.cloneNode(true);
    const undo = gone.querySelector("button");
    gone.querySelector(".words").textContent = `Deleted: ${video.prompt ?? "a video"}`;
    item.querySelector("video")?.pause();
    item.replaceWith(gone);
    undo.focus();
    this.page.say("deleted; Undo brings it back");
    const over = async () => {
      this.leaving.delete(video.id);
      await api.remove(video.id).catch((error) => { if (error.status !== 404) throw error; });
      this.shown.delete(video.id);
      const next = gone.nextElementSibling ?? gone.previousElementSibling;
      if (gone.contains(document.activeElement)) (next?.querySelector("button") ?? $("bring")).focus();
      gone.remove();
      this.empty();
    };
    const back = () => {
      window.clearTimeout(this.leaving.get(video.id));
      this.leaving.delete(video.id);
      gone.replaceWith(item);
      item.querySelector("button")?.focus();
    };
    undo.onclick = () => { back(); this.page.say("it is back"); };
    this.leaving.set(video.id, window.setTimeout(
      () => over().catch((error) => { back(); this.page.fail(error); }), UNDO_MS));
  }
}

/** Whether the reader looks on while a job is made: it is in sight, and nothing is being written or asked.
 * @param {HTMLElement} item */
function watches(item) {
  const { top, bottom } = item.getBoundingClientRect();
  const busy = document.querySelector("dialog[open]") || document.activeElement?.matches("input, textarea, select");
  return !busy && bottom > 0 && top < window.innerHeight;
}

/** A film that goes round by itself, with its buttons where they are looked for. @param {any} film @param {string | null} words */
export function plays(film, words) {
  film.setAttribute("aria-label", words || "a video");
  film.muted = true;
  film.autoplay = !still.matches;
  film.controls = still.matches;
  for (const kind of ["pointerenter", "focus"]) film.addEventListener(kind, () => { film.controls = true; });
  for (const kind of ["pointerleave", "blur"]) film.addEventListener(kind, () => { film.controls = still.matches; });
}

/** A video as something to work on. @param {any} video @returns {import("./works.js").Source} */
const sourceOf = (video) => ({
  id: video.id, prompt: video.prompt ?? "", size: video.size.split("x").map(Number), frames: video.num_frames,
  rate: video.fps, frame: api.content(video.id, "thumbnail"), draft: video.draft,
});
