// @ts-check
// The form, its state in the address and in local storage, and what holds the page together.

import { api, of, Refused } from "./api.js";
import { adapters, OFF, offer, tick } from "./choices.js";
import { Foresight } from "./foresight.js";
import { Gallery } from "./gallery.js";
import { bring, sent } from "./own.js";
import { kept, Timeline } from "./timeline.js";
import { media } from "./works.js";

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));
const FIELDS = ["prompt", "size", "length", "seed", "steps", "guidance", "fps", "solver", "priority", "ladder", "guidance2", "label", "negative"];
const CHECKS = ["loop", "lock", "draft"];
const STATE = "sora_engine.form";

/** What a stored request may have that this form holds too. */
const HELD = new Set([
  "prompt", "height", "width", "num_frames", "seed", "num_inference_steps", "guidance_scale", "guidance_scale_2", "fps",
  "solver", "ladder", "label", "negative_prompt", "draft", "loras", "clips", "shots", "loop",
]);
/** The share of a video that one clip may be before the time line is made longer for it. */
const MOST_KNOWN = 0.75;
/** How long the page tells of what happened, before it tells again how things stand. */
const TOLD_MS = 8000;
/** A reader of screens that is told each step hears nothing else. */
const STAND_MS = 5000;

/** @type {any} */
let model = null;
/** What the head of the page says: what happened last, and how the jobs stand. */
const head = { event: "", standing: "", timer: 0, later: 0, at: 0 };
/** Whether the problem that is shown is of the plan: the next plan that succeeds takes it away. */
let ofPlan = false;

/** Tells what happened. */
function say(/** @type {string} */ words) {
  head.event = words;
  window.clearTimeout(head.timer);
  head.timer = window.setTimeout(() => { head.event = ""; showHead(); }, TOLD_MS);
  showHead();
}

/** Tells how the jobs stand; "" where none is under way. */
function stand(/** @type {string} */ words) {
  const isNew = words.split(" ")[0] !== $("status").textContent.split(" ")[0]; // from waiting to its steps, from steps to frames
  const left = STAND_MS - (Date.now() - head.at);
  head.standing = words;
  window.clearTimeout(head.later);
  if (isNew || left <= 0) showHead();
  else head.later = window.setTimeout(showHead, left);
}

function showHead() {
  const words = head.event || head.standing;
  if (!head.event && words) head.at = Date.now();
  if ($("status").textContent !== words) $("status").textContent = words;
}

function fail(/** @type {unknown} */ error) {
  if (error instanceof Refused && error.status === 401) return void enter();
  ofPlan = false;
  const words = error instanceof Error ? error.message : String(error);
  if ($("problem").textContent === words) return;
  $("problem").textContent = words;
  $("problem").scrollIntoView({ block: "nearest" });
}

const timeline = new Timeline($("track"), changed);
const gallery = new Gallery({
  say, stand, fail, again, place, most: () => model?.max_priority ?? 0,
  ended: () => foresight.soon(), // what the next one takes is known better now
});
const foresight = new Foresight($("plan"), () => (model && $("prompt").value.trim() ? of("", wire()) : null), {
  failed: (error) => { fail(error); ofPlan = true; },
  went: () => { if (ofPlan) $("problem").textContent = ""; },
});

function shape() {
  const step = model.grid.time * model.grid.patch[0];
  timeline.shape({ frames: Number($("length").value), step, fps: fps(), loop: $("loop").checked });
}

const fps = () => Number($("fps").value) || model.defaults.fps;

/** Sizes and lengths that the model makes, the checkpoint's own first. */
function presets() {
  const { defaults, grid, limits } = model;
  const rows = grid.vae_spatial * grid.patch[1], columns = grid.vae_spatial * grid.patch[2];
  const near = (/** @type {number} */ side, /** @type {number} */ of) => Math.max(of, Math.round(side / of) * of);
  const area = defaults.height * defaults.width;
  const sizes = new Map([[`${defaults.width}x${defaults.height}`, "standard"]]);
  for (const [name, ratio, scale] of /** @type {[string, number, number][]} */ ([
    ["square", 1, 1], ["wide 16:9", 16 / 9, 1], ["tall 9:16", 9 / 16, 1], ["wide 4:3", 4 / 3, 1],
    ["small", defaults.width / defaults.height, 0.25], ["large", defaults.width / defaults.height, 2.25],
  ])) {
    const height = near(Math.sqrt((area * scale) / ratio), rows), width = near(Math.sqrt(area * scale * ratio), columns);
    const size = `${width}x${height}`;
    if (height * width <= limits.max_pixels && !sizes.has(size)) sizes.set(size, name);
  }
  options($("size"), [...sizes].map(([size, name]) => [size, `${size} (${name})`]));
  lengths();
  offer(model, changed);
  $("priority").max = String(model.max_priority ?? 0);
  $("steps").placeholder = defaults.num_inference_steps;
  $("guidance").placeholder = defaults.guidance_scale;
  $("fps").placeholder = defaults.fps;
  const like = defaults.example_prompt;
  $("prompt").placeholder = `What the video shows${like ? `, such as “${like}”` : ""}`;
  $("negative").placeholder = defaults.negative_prompt || "nothing";
}

function lengths() {
  const { defaults, grid, limits } = model;
  const step = grid.time * grid.patch[0], first = $("loop").checked ? 0 : 1, own = defaults.num_frames;
  const frames = new Set(first || grid.images ? [1] : []);
  for (const scale of grid.images ? [] : [0.25, 0.5, 1, 2, 4]) {
    const on = Math.max(first ? 1 : step, Math.round((own * scale - first) / step) * step + first);
    if (on <= limits.max_frames) frames.add(on);
  }
  const before = $("length").value, rate = fps();
  options($("length"), [...frames].map((n) => [String(n), n === 1 ? "1 frame (a picture)" : `${n} frames (${(n / rate).toFixed(1)} s)`]));
  const wanted = Number(before) || own;
  const best = [...frames].reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
  $("length").value = String(best);
}

/** @param {any} select @param {[string, string][]} all */
function options(select, all) {
  const before = select.value;
  select.replaceChildren(...all.map(([value, text]) => new Option(text, value)));
  if (all.some(([value]) => value === before)) select.value = before;
}

/** The request as the server takes it. */
function wire() {
  const number = (/** @type {string} */ name) => ($(name).value === "" ? undefined : Number($(name).value));
  const prompt = $("prompt").value.trim() || " ";
  const { clips, shots } = timeline.wire(prompt);
  const loop = $("loop").checked;
  const line = clips.length || (shots.length && loop) ? { timeline: { clips, shots, loop } } : { loop, shots };
  return {
    prompt, ...line,
    size: $("size").value,
    num_frames: Number($("length").value),
    seed: $("seed").value === "" ? undefined : Number($("seed").value),
    num_inference_steps: number("steps"),
    guidance_scale: number("guidance"),
    fps: number("fps"),
    priority: number("priority"),
    solver: $("solver").value || undefined,
    negative_prompt: $("negative").value || undefined,
    ladder: $("ladder").value === OFF ? "" : $("ladder").value || undefined,
    guidance_scale_2: number("guidance2"),
    label: $("label").value.trim() || undefined,
    draft: $("draft").checked || undefined,
    loras: adapters(),
  };
}

function dice() {
  $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

function changed() {
  $("count").textContent = `${$("prompt").value.length} characters`;
  const state = {
    ...Object.fromEntries(FIELDS.map((name) => [name, $(name).value])),
    ...Object.fromEntries(CHECKS.map((name) => [name, $(name).checked])),
    loras: adapters(),
    cards: timeline.cards,
  };
  const text = JSON.stringify(state);
  try { localStorage.setItem(STATE, text); } catch { /* private windows have none */ }
  history.replaceState(null, "", `#${encodeURIComponent(text)}`);
  foresight.soon();
}

function restore() {
  let saved = null;
  const address = location.hash.slice(1);
  for (const read of [() => decodeURIComponent(address), () => localStorage.getItem(STATE)]) {
    try { saved ??= JSON.parse(read() || "null"); } catch { /* an address of something else */ }
  }
  for (const name of CHECKS) if (saved) $(name).checked = saved[name] === true;
  lengths();
  for (const name of FIELDS) {
    const value = saved?.[name];
    if (typeof value !== "string") continue;
    const field = $(name);
    if (field instanceof HTMLSelectElement && ![...field.options].some((one) => one.value === value)) {
      if (name === "ladder") continue;
      field.append(new Option(name === "length" ? `${value} frames` : value, value));
    }
    field.value = value;
  }
  tick(saved?.loras);
  timeline.cards = kept(saved?.cards);
  if (!$("seed").value) dice();
}

/** The form as a video was made, with its clips. What the form cannot hold is asked for in a dialog. @param {any} video */
async function again(video) {
  const { task, fields, over } = await api.request(video.id);
  const held = Object.keys(fields).every((name) => HELD.has(name));
  if (task !== "create" || over || !held || fields.loras?.some((/** @type {any} */ one) => one.expert)) {
    return gallery.works.repeat(video, !fields.shots?.length);
  }
  const clips = await Promise.all((fields.clips ?? []).map(cardOf));
  $("prompt").value = video.prompt ?? "";
  $("loop").checked = fields.loop === true;
  lengths();
  for (const [name, value] of [["size", video.size], ["length", String(video.num_frames)], ["ladder", fields.ladder === "" ? OFF : fields.ladder ?? ""]]) {
    if (![...$(name).options].some((/** @type {any} */ one) => one.value === value)) $(name).append(new Option(value, value));
    $(name).value = value;
  }
  $("seed").value = String(video.seed);
  for (const [name, field] of [
    ["steps", "num_inference_steps"], ["guidance", "guidance_scale"], ["guidance2", "guidance_scale_2"], ["fps", "fps"],
    ["solver", "solver"], ["label", "label"], ["negative", "negative_prompt"],
  ]) $(name).value = String(fields[field] ?? "");
  $("draft").checked = fields.draft === true;
  tick(fields.loras);
  let at = 0;
  timeline.cards = clips;
  for (const shot of fields.shots ?? []) {
    if (at) timeline.cards.push({ kind: "text", at, words: shot.prompt });
    else $("prompt").value = shot.prompt;
    at += shot.num_frames;
  }
  shape();
  changed();
  $("prompt").focus();
  say("the form is as that video was made");
}

/** A clip of a stored request as a card. @param {any} clip @returns {Promise<import("./timeline.js").Card>} */
async function cardOf({ upload, at, start, stop, mask }) {
  const name = `upload_${upload}`, found = await api.uploaded(name);
  return {
    kind: found.num_frames > 1 ? "clip" : "picture", at, upload: name, frames: found.num_frames, rate: found.fps, start, stop,
    mask: mask && { upload: `upload_${mask.upload}` },
  };
}

async function make(/** @type {Event} */ event) {
  event.preventDefault();
  $("problem").textContent = "";
  if (!$("prompt").value.trim()) return fail(new Error("there is no prompt; say what the video shows"));
  $("make").disabled = true;
  try {
    gallery.begun(await api.make(of("", wire())));
    say("queued");
    if (!$("lock").checked) dice();
    changed();
  } catch (error) {
    fail(error);
  } finally {
    $("make").disabled = false;
    if (document.activeElement === document.body) $("make").focus(); // being disabled took it away
  }
}

async function addFile(/** @type {File} */ file) {
  say("uploading");
  const { id: upload, num_frames: frames, fps: rate, width, height } = await sent(file);
  onto({ kind: frames > 1 ? "clip" : "picture", at: 0, name: file.name, upload, frames, rate: frames > 1 ? rate : undefined });
  const [across, down] = $("size").value.split("x").map(Number);
  if (Math.abs(Math.log((width * down) / (height * across))) > 0.05) say(`${file.name} is on the time line; its middle is taken, as the video has another shape`);
}

/** A video, or a file of the reader's, as a card. @param {import("./works.js").Source} source */
function place(source) {
  const name = source.prompt || undefined;
  onto({ kind: source.frames > 1 ? "clip" : "picture", at: 0, name, ...media(source), frames: source.frames, rate: source.rate });
  $("line-name").scrollIntoView({ block: "nearest" });
}

/** Puts a card onto the time line, which becomes longer where the clip would leave next to nothing to make.
 * @param {import("./timeline.js").Card} card */
function onto(card) {
  const long = timeline.whole(card);
  const longer = [...$("length").options].map((one) => Number(one.value)).filter((n) => n * MOST_KNOWN >= long).sort((a, b) => a - b);
  const grows = card.kind === "clip" && long > MOST_KNOWN * timeline.frames && longer.length > 0;
  if (grows) {
    $("length").value = String(longer[0]);
    shape();
  }
  timeline.add(card);
  say(`${card.name ?? "it"} is on the time line${grows ? `, which has ${longer[0]} frames now: the model makes those behind it` : ""}`);
}

/** Asks for the key, and opens the page with it. */
function enter() {
  if ($("key-dialog").open) return;
  $("key-dialog").showModal();
}

async function open() {
  const told = await api.models();
  const first = told.data[0];
  model = first.sora;
  $("model").textContent = first.id;
  presets();
  restore();
  shape();
  changed();
  await gallery.refresh();
}

$("form").addEventListener("submit", make);
for (const name of FIELDS) $(name).addEventListener(name === "prompt" || name === "negative" ? "input" : "change", changed);
for (const name of ["length", "fps"]) $(name).addEventListener("change", shape);
$("loop").addEventListener("change", () => { lengths(); shape(); changed(); });
$("lock").addEventListener("change", changed);
$("dice").addEventListener("click", () => { dice(); changed(); });
$("add-text").addEventListener("click", () => timeline.add({ kind: "text", at: Math.floor(timeline.frames / 2), words: "" }));
$("add-file").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) addFile(file).catch(fail);
  $("file").value = "";
});
$("track").addEventListener("dragover", (/** @type {DragEvent} */ event) => event.preventDefault());
$("track").addEventListener("drop", (/** @type {DragEvent} */ event) => {
  event.preventDefault();
  for (const file of event.dataTransfer?.files ?? []) addFile(file).catch(fail);
});
$("bring").addEventListener("click", () => $("own").click());
$("own").addEventListener("change", () => {
  const [file] = $("own").files;
  if (file) { say("uploading"); bring(file, gallery).then(() => say(`${file.name} is here to be worked on`), fail); }
  $("own").value = "";
});
$("pick-stop").addEventListener("click", () => gallery.works.unpick());
$("older").addEventListener("click", () => gallery.older().catch(fail));
$("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  api.enter($("key").value)
    .then(() => { $("key-dialog").close(); return open(); })
    .catch((error) => { $("key-problem").textContent = error.message; });
});

open().catch(fail);
window.setInterval(() => {
  if (!model) { // the server still loads its model, or was away
    if (!$("key-dialog").open) open().then(() => { $("problem").textContent = ""; }, fail);
  } else if (!document.hidden) gallery.refresh().catch((error) => gallery.lacks(error.message));
}, 3000);
