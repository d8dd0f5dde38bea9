// @ts-check
// The time line: cards of text, picture and clip at frames of the model's own grid.

import { api } from "./api.js";
import { frameOf } from "./media.js";

/** name: of its file, or the prompt of its video. frames, rate: how many a clip has in its own file, and how many of them are a second. start, stop: those that count,
 * at the rate of the video that is made. mask: of a request that had one.
 * @typedef {{kind: "text"|"picture"|"clip", at: number, name?: string, words?: string, upload?: string, video_id?: string, frames?: number,
 *   rate?: number, start?: number, stop?: number|null, mask?: object, muted?: boolean}} Card */

const NAMES = { text: "Text", picture: "Picture", clip: "Clip" };

/** Cards of an address or of an earlier visit, without what is none. @param {unknown} cards */
export const kept = (cards) => (Array.isArray(cards) ? cards : []).filter(
  (/** @type {any} */ card) => Object.hasOwn(NAMES, card?.kind) && Number.isFinite(card.at),
);

export class Timeline {
  /** @param {HTMLElement} track @param {() => void} changed */
  constructor(track, changed) {
    this.track = track;
    this.ruler = /** @type {HTMLElement} */ (track.querySelector(".ruler"));
    this.list = /** @type {HTMLElement} */ (track.querySelector(".cards"));
    this.changed = changed;
    /** @type {Card[]} */
    this.cards = [];
    this.frames = 1;
    this.step = 1;
    this.fps = 8;
    this.loop = false;
    /** @type {WeakMap<HTMLElement, (() => void)[]>} What shows a card's values in its item. */
    this.refreshers = new WeakMap();
  }

  /** @param {{frames: number, step: number, fps: number, loop: boolean}} shape */
  shape(shape) {
    Object.assign(this, shape);
    for (const card of this.cards) card.at = this.fit(card, card.at);
    this.draw();
  }

  /** The nearest frame at which a latent frame begins: 0, 1, 1 + step, ... ; in a loop 0, step, ...
   * @param {number} frame */
  snap(frame) {
    const last = Math.max(0, this.frames - 1);
    const first = this.loop ? 0 : 1;
    if (!this.loop && frame < 0.5) return 0;
    const on = first + Math.max(0, Math.round((frame - first) / this.step)) * this.step;
    return Math.min(on, first + Math.floor((last - first) / this.step) * this.step);
  }

  /** The next place on the grid in a direction. @param {number} at @param {number} by in steps */
  next(at, by) {
    const first = this.loop ? 0 : 1;
    if (!this.loop && at === 0) return by > 0 ? this.snap(1 + (by - 1) * this.step) : 0;
    const to = at + by * this.step;
    return to < first ? 0 : this.snap(to);
  }

  /** How many frames a clip has at the rate of the video: its last one is on screen up to its end. @param {Card} card */
  whole(card) {
    return Math.max(1, Math.ceil(((card.frames ?? 1) * this.fps) / (card.rate || this.fps) - 1e-6));
  }

  /** How many frames of the ruler a card covers. A picture stands still for a latent frame. @param {Card} card */
  long(card) {
    if (card.kind === "picture") return card.at === 0 && !this.loop ? 1 : this.step;
    if (card.kind === "clip") return (card.stop ?? this.whole(card)) - (card.start ?? 0);
    const later = this.cards.filter((other) => other.kind === "text" && !other.muted && other.at > card.at);
    return Math.min(this.frames, ...later.map((other) => other.at)) - card.at;
  }

  /** The place nearest to a frame at which a card does not run past the end. @param {Card} card @param {number} frame */
  fit(card, frame) {
    let at = this.snap(frame);
    while (card.kind === "clip" && at > 0 && at + this.long(card) > this.frames) at = this.next(at, -1);
    return at;
  }

  /** A place at which nothing else is known yet: the beginning, the end, or one in between. @param {Card} card */
  free(card) {
    const taken = this.cards.filter((other) => other.kind !== "text");
    const clear = (/** @type {number} */ at) => taken.every(
      (other) => other.at + this.long(other) <= at || at + this.long(card) <= other.at);
    return [0, this.fit(card, this.frames), ...this.places()].find((at) => clear(at)) ?? 0;
  }

  /** The frames at which something new can begin. */
  places() {
    const places = this.loop ? [] : [0];
    for (let at = this.loop ? 0 : 1; at < this.frames; at += this.step) places.push(at);
    return places;
  }

  /** Puts a card where it fits. A clip that is longer than the video is cut to it. @param {Card} card */
  add(card) {
    if (card.kind === "clip" && this.long(card) > this.frames) card.stop = (card.start ?? 0) + this.frames;
    card.at = card.kind === "text" ? this.snap(card.at) : this.fit(card, this.free(card));
    this.cards.push(card);
    this.done(card);
  }

  /** @param {Card} [focus] */
  done(focus) {
    this.draw();
    if (focus) {
      const place = this.cards.indexOf(focus);
      /** @type {HTMLElement|null} */ (this.list.children[place])?.focus();
    }
    this.changed();
  }

  draw() {
    this.track.classList.toggle("loop", this.loop);
    this.ruler.replaceChildren();
    const places = this.places();
    const thin = Math.ceil(places.length / 120);
    places.forEach((at, n) => {
      if (n % thin) return;
      const tick = document.createElement("i");
      tick.style.left = this.left(at);
      this.ruler.append(tick);
    });
    const seconds = this.frames / this.fps;
    const every = Math.max(1, Math.ceil(seconds / 12));
    for (let second = 0; second < seconds; second += every) {
      const label = document.createElement("b");
      label.textContent = `${second} s`;
      label.style.left = this.left(second * this.fps);
      label.classList.toggle("late", second * this.fps > 0.9 * this.frames);
      this.ruler.append(label);
    }
    if (this.loop) this.ruler.append(Object.assign(document.createElement("b"), { className: "late again", textContent: "0 s" }));
    this.track.classList.toggle("bare", !this.cards.length);
    this.marks();
    this.list.replaceChildren(...this.cards.map((card) => this.item(card)));
  }

  /** Where each card begins, on the ruler. */
  marks() {
    for (const old of this.ruler.querySelectorAll("u")) old.remove();
    for (const card of this.cards) {
      const mark = document.createElement("u");
      mark.className = card.kind;
      mark.style.left = this.left(card.at);
      this.ruler.append(mark);
    }
  }

  /** A card was changed in place. Its elements stay: a button that is being pressed is one. */
  edited() {
    this.refresh();
    this.changed();
  }

  refresh() {
    this.marks();
    this.cards.forEach((card, place) => this.tell(card, /** @type {HTMLElement} */ (this.list.children[place])));
  }

  /** Shows in an item how its card is now. @param {Card} card @param {HTMLElement} item */
  tell(card, item) {
    item.style.setProperty("--at", this.left(card.at));
    item.style.setProperty("--long", this.left(Math.min(this.long(card), this.frames - card.at)));
    item.setAttribute("aria-label", this.named(card));
    for (const refresh of this.refreshers.get(item) ?? []) refresh();
  }

  /** @param {Card} card */
  named(card) {
    return `${NAMES[card.kind]} at frame ${card.at}`;
  }

  left(/** @type {number} */ frame) {
    return `${(100 * frame) / Math.max(1, this.frames)}%`;
  }

  /** @param {Card} card */
  item(card) {
    const item = document.createElement("li");
    const name = NAMES[card.kind], tools = document.createElement("div");
    this.refreshers.set(item, []);
    item.className = `card ${card.kind}${card.muted ? " muted" : ""}`;
    item.tabIndex = 0;
    tools.className = "tools";
    item.append(this.bar(card, item), tools);
    if (card.kind === "text") {
      const words = this.field(item, "Words", () => card.words ?? "", (text) => { card.words = text; }, "words", "What it shows from here");
      tools.append(words);
    }
    tools.append(this.word("from frame"), this.field(item, "From frame", () => card.at, (text) => {
      card.at = this.fit(card, Number(text) || 0);
    }));
    if (card.kind === "clip") {
      tools.append(this.word("its frames"), this.field(item, "First frame of the clip", () => card.start ?? 0, (text) => {
        card.start = Math.max(0, Math.min(Number(text) || 0, (card.stop ?? this.whole(card)) - 1));
      }));
      tools.append(this.word("up to"), this.field(item, "Frame after its last", () => card.stop ?? this.whole(card), (text) => {
        const stop = Number(text) || 0;
        card.stop = stop > (card.start ?? 0) && stop < this.whole(card) ? stop : null;
        card.at = this.fit(card, card.at);
      }));
    }
    tools.append(
      this.button(card.muted ? "Unmute" : "Mute", `${card.muted ? "Unmute" : "Mute"} ${name}`, () => {
        card.muted = !card.muted;
        this.done(card);
      }),
      this.button("×", `Remove ${name}`, () => this.remove(card)),
    );
    item.addEventListener("keydown", (event) => this.key(event, card, item));
    item.addEventListener("pointerdown", (event) => this.drag(event, card, item));
    this.tell(card, item);
    return item;
  }

  /** The stretch of the ruler that a card covers. @param {Card} card @param {HTMLElement} item */
  bar(card, item) {
    const bar = document.createElement("div"), frame = card.video_id ? api.content(card.video_id, "thumbnail") : frameOf(card.upload);
    bar.className = "bar";
    if (frame) {
      const picture = document.createElement("img");
      Object.assign(picture, { src: frame, alt: "", draggable: false });
      bar.append(picture);
    }
    const word = this.word(card.name ?? NAMES[card.kind]);
    bar.title = word.textContent ?? "";
    bar.append(word);
    if (card.kind === "text") this.refreshers.get(item)?.push(() => { word.textContent = card.words || NAMES.text; });
    if (card.kind === "clip") {
      bar.prepend(this.handle("Trim its beginning", card, item, false));
      bar.append(this.handle("Trim its end", card, item, true));
    }
    return bar;
  }

  /** What an end of a clip is drawn by. @param {string} name @param {Card} card @param {HTMLElement} item
   * @param {boolean} atEnd */
  handle(name, card, item, atEnd) {
    const handle = document.createElement("span");
    const value = () => (atEnd ? card.at + this.long(card) : card.at);
    handle.className = "handle";
    handle.tabIndex = 0;
    handle.setAttribute("role", "slider");
    handle.setAttribute("aria-label", name);
    handle.title = `${name}: drag, or use the arrow keys`;
    const show = () => {
      handle.setAttribute("aria-valuemin", "0");
      handle.setAttribute("aria-valuemax", String(this.frames));
      handle.setAttribute("aria-valuenow", String(value()));
      handle.setAttribute("aria-valuetext", `frame ${value()}`);
    };
    this.refreshers.get(item)?.push(show);
    handle.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const ends = this.ends(card, atEnd), now = ends.indexOf(value()), far = event.shiftKey ? this.second() : 1;
      this.trim(card, atEnd, ends[Math.max(0, Math.min(ends.length - 1, now + by * far))]);
      this.edited();
    });
    handle.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      event.preventDefault();
      handle.focus();
      const from = event.clientX, begun = value();
      this.follow(event, handle, (move) => this.trim(card, atEnd, begun + this.inFrames(move.clientX - from)), card);
    });
    return handle;
  }

  /** The frames at which an end of a clip may be, of those at which something begins; and where it is now.
   * @param {Card} card @param {boolean} atEnd */
  ends(card, atEnd) {
    const start = card.start ?? 0, now = card.at + this.long(card);
    if (!atEnd) return this.places().filter((at) => at >= card.at - start && at < now);
    const last = Math.min(this.frames, card.at + this.whole(card) - start);
    const ends = this.places().filter((at) => at > card.at && at < last);
    return [...new Set([...ends, now, last])].sort((a, b) => a - b);
  }

  /** Puts an end of a clip at the nearest frame that it may have. What is seen of the clip stays where it is.
   * @param {Card} card @param {boolean} atEnd @param {number} frame */
  trim(card, atEnd, frame) {
    const to = this.ends(card, atEnd).reduce((a, b) => (Math.abs(b - frame) < Math.abs(a - frame) ? b : a));
    if (atEnd) {
      const stop = (card.start ?? 0) + to - card.at;
      card.stop = stop < this.whole(card) ? stop : null;
    } else {
      card.start = (card.start ?? 0) + to - card.at;
      card.at = to;
    }
  }

  /** @param {string} text */
  word(text) {
    const word = document.createElement("span");
    word.className = "kind";
    word.textContent = text;
    return word;
  }

  /** @param {HTMLElement} item @param {string} name @param {() => string|number} get @param {(text: string) => void} set */
  field(item, name, get, set, kind = "number", hint = "") {
    const input = document.createElement("input");
    input.className = kind;
    this.refreshers.get(item)?.push(() => { input.value = String(get()); });
    input.setAttribute("aria-label", name);
    input.title = name;
    input.placeholder = hint;
    if (kind === "number") input.inputMode = "numeric";
    input.addEventListener("change", () => { set(input.value); this.edited(); });
    return input;
  }

  /** @param {string} text @param {string} name @param {() => void} act */
  button(text, name, act) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", name);
    button.addEventListener("click", act);
    return button;
  }

  /** @param {Card} card */
  remove(card) {
    this.cards.splice(this.cards.indexOf(card), 1);
    this.done();
  }

  /** @param {KeyboardEvent} event @param {Card} card @param {HTMLElement} item */
  key(event, card, item) {
    if (event.target !== item) {
      if (event.key === "Enter") { event.preventDefault(); item.focus(); }
      return;
    }
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) card.at = this.fit(card, this.next(card.at, event.shiftKey ? by * this.second() : by));
    else if (event.key === "Delete" || event.key === "Backspace") { event.preventDefault(); return this.remove(card); }
    else if (event.key === "Enter") { event.preventDefault(); return item.querySelector("input")?.focus(); }
    else return;
    event.preventDefault();
    this.done(card);
  }

  /** A second in steps of the grid. */
  second() {
    return Math.max(1, Math.round(this.fps / this.step));
  }

  /** @param {PointerEvent} event @param {Card} card @param {HTMLElement} item */
  drag(event, card, item) {
    if (event.target instanceof HTMLInputElement || event.target instanceof HTMLButtonElement) return;
    const from = event.clientX, at = card.at;
    this.follow(event, item, (move) => { card.at = this.fit(card, at + this.inFrames(move.clientX - from)); }, card);
  }

  /** Changes a card as the pointer goes, until it is let go. @param {PointerEvent} event @param {HTMLElement} held
   * @param {(move: PointerEvent) => void} act @param {Card} card */
  follow(event, held, act, card) {
    const before = JSON.stringify(card);
    held.setPointerCapture(event.pointerId);
    held.onpointermove = (move) => {
      act(move);
      this.refresh();
    };
    held.onpointerup = held.onpointercancel = () => {
      held.onpointermove = held.onpointerup = held.onpointercancel = null;
      if (JSON.stringify(card) !== before) this.edited();
    };
  }

  /** Pixels as frames. @param {number} pixels */
  inFrames(pixels) {
    return (pixels / this.list.clientWidth) * this.frames;
  }

  /** The time line as the server takes it. @param {string} prompt */
  wire(prompt) {
    const seen = this.cards.filter((card) => !card.muted);
    const clips = seen.filter((card) => card.kind !== "text").map((card) => ({
      ...(card.upload ? { upload: card.upload } : { video_id: card.video_id }),
      at: card.at,
      ...(card.kind === "clip" && card.start ? { start: card.start } : {}),
      ...(card.kind === "clip" && card.stop ? { stop: card.stop } : {}),
      ...(card.mask ? { mask: card.mask } : {}),
    }));
    const texts = seen.filter((card) => card.kind === "text" && card.words).sort((a, b) => a.at - b.at);
    const shots = [];
    if (texts.length) {
      if (texts[0].at > 0) shots.push({ prompt, num_frames: texts[0].at });
      texts.forEach((card, n) => {
        const end = texts[n + 1]?.at ?? this.frames;
        if (end > card.at) shots.push({ prompt: card.words, num_frames: end - card.at });
      });
    }
    return { clips, shots };
  }
}
