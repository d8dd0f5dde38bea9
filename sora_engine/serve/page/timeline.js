// @ts-check
// The time line: cards of text, picture and clip at frames of the model's own grid.

/** @typedef {{kind: "text"|"picture"|"clip", at: number, words?: string, upload?: string,
 *   video_id?: string, frames?: number, start?: number, stop?: number|null, muted?: boolean}} Card */

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
  }

  /** @param {{frames: number, step: number, fps: number, loop: boolean}} shape */
  shape(shape) {
    Object.assign(this, shape);
    for (const card of this.cards) card.at = this.snap(card.at);
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

  /** @param {Card} card */
  add(card) {
    card.at = this.snap(card.at);
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
    const first = this.loop ? 0 : 1;
    const places = this.loop ? [] : [0];
    for (let at = first; at < this.frames; at += this.step) places.push(at);
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
      this.ruler.append(label);
    }
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

  /** A card's own field was changed. Its elements stay: a button that is being pressed is one. */
  edited() {
    this.marks();
    this.cards.forEach((card, place) => {
      const item = /** @type {HTMLElement} */ (this.list.children[place]);
      item.style.setProperty("--at", this.left(card.at));
      item.setAttribute("aria-label", this.named(card));
    });
    this.changed();
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
    const name = NAMES[card.kind];
    item.className = `card ${card.kind}${card.muted ? " muted" : ""}`;
    item.tabIndex = 0;
    item.style.setProperty("--at", this.left(card.at));
    item.setAttribute("aria-label", this.named(card));
    item.append(this.word(name));
    if (card.kind === "text") {
      item.append(this.field("Words", () => card.words ?? "", (text) => { card.words = text; }, "words", "What it shows from here"));
    }
    item.append(this.word("from frame"), this.field("From frame", () => card.at, (text) => { card.at = this.snap(Number(text) || 0); }));
    if (card.kind === "clip") {
      item.append(this.word("its"), this.field("First frame of the clip", () => card.start ?? 0, (text) => {
        card.start = Math.max(0, Math.min(Number(text) || 0, (card.frames ?? 1) - 1));
      }));
      item.append(this.word("to"), this.field("Frame after its last", () => card.stop ?? card.frames ?? "", (text) => {
        const stop = Number(text) || 0;
        card.stop = stop > (card.start ?? 0) ? stop : null;
      }));
    }
    item.append(
      this.button(card.muted ? "Unmute" : "Mute", `${card.muted ? "Unmute" : "Mute"} ${name}`, () => {
        card.muted = !card.muted;
        this.done(card);
      }),
      this.button("×", `Remove ${name}`, () => this.remove(card)),
    );
    item.addEventListener("keydown", (event) => this.key(event, card, item));
    item.addEventListener("pointerdown", (event) => this.drag(event, card, item));
    return item;
  }

  /** @param {string} text */
  word(text) {
    const word = document.createElement("span");
    word.className = "kind";
    word.textContent = text;
    return word;
  }

  /** @param {string} name @param {() => string|number} get @param {(text: string) => void} set */
  field(name, get, set, kind = "number", hint = "") {
    const input = document.createElement("input");
    input.className = kind;
    input.value = String(get());
    input.setAttribute("aria-label", name);
    input.title = name;
    input.placeholder = hint;
    if (kind === "number") input.inputMode = "numeric";
    input.addEventListener("change", () => { set(input.value); input.value = String(get()); this.edited(); });
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
    const second = Math.max(1, Math.round(this.fps / this.step));
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) card.at = this.next(card.at, event.shiftKey ? by * second : by);
    else if (event.key === "Delete" || event.key === "Backspace") { event.preventDefault(); return this.remove(card); }
    else if (event.key === "Enter") { event.preventDefault(); return item.querySelector("input")?.focus(); }
    else return;
    event.preventDefault();
    this.done(card);
  }

  /** @param {PointerEvent} event @param {Card} card @param {HTMLElement} item */
  drag(event, card, item) {
    if (event.target instanceof HTMLInputElement || event.target instanceof HTMLButtonElement) return;
    const from = event.clientX, at = card.at, width = this.track.clientWidth;
    item.setPointerCapture(event.pointerId);
    item.onpointermove = (move) => {
      const to = this.snap(at + ((move.clientX - from) / width) * this.frames);
      if (to === card.at) return;
      card.at = to;
      item.style.setProperty("--at", this.left(to));
      this.marks();
    };
    item.onpointerup = item.onpointercancel = () => {
      item.onpointermove = item.onpointerup = item.onpointercancel = null;
      if (card.at !== at) this.done(card);
    };
  }

  /** The time line as the server takes it. @param {string} prompt */
  wire(prompt) {
    const seen = this.cards.filter((card) => !card.muted);
    const clips = seen.filter((card) => card.kind !== "text").map((card) => ({
      ...(card.upload ? { upload: card.upload } : { video_id: card.video_id }),
      at: card.at,
      ...(card.kind === "clip" && card.start ? { start: card.start } : {}),
      ...(card.kind === "clip" && card.stop && card.stop !== card.frames ? { stop: card.stop } : {}),
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
