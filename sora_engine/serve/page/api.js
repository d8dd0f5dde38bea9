// @ts-check
// The server's routes. Every failure is an Error with the server's own words.

export class Refused extends Error {
  /** @param {number} status @param {any} body */
  constructor(status, body) {
    super(body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.param = body?.error?.param ?? null;
    this.code = body?.error?.code ?? null;
  }
}

/** @param {string} path @param {RequestInit} [options] */
async function call(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Error("the server cannot be reached");
  }
  const body = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(answer.status, body);
  return body;
}

/** @param {string} path @param {object} fields */
const post = (path, fields = {}) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) });

const id = (/** @type {string} */ video) => `/v1/videos/${encodeURIComponent(video)}`;

export const api = {
  models: () => call("/v1/models"),
  enter: (/** @type {string} */ key) => post("/session", { key }),
  list: (/** @type {string | null} */ after = null) =>
    call(`/v1/videos?limit=20${after ? `&after=${encodeURIComponent(after)}` : ""}`),
  video: (/** @type {string} */ video) => call(id(video)),
  request: (/** @type {string} */ video) => call(`${id(video)}/request`),
  credentials: (/** @type {string} */ video) => call(`${id(video)}/credentials`),
  plan: (/** @type {object} */ fields) => post("/v1/videos/plan", fields),
  create: (/** @type {object} */ fields) => post("/v1/videos", fields),
  extend: (/** @type {object} */ fields) => post("/v1/videos/extensions", fields),
  edit: (/** @type {object} */ fields) => post("/v1/videos/edits", fields),
  connect: (/** @type {object} */ fields) => post("/v1/videos/connect", fields),
  work: (/** @type {string} */ video, /** @type {string} */ kind, /** @type {object} */ fields) =>
    post(`${id(video)}/${kind}`, fields),
  cancel: (/** @type {string} */ video) => post(`${id(video)}/cancel`),
  turn: (/** @type {string} */ video, /** @type {number} */ priority) => post(`${id(video)}/priority`, { priority }),
  remove: (/** @type {string} */ video) => call(id(video), { method: "DELETE" }),
  upload(/** @type {Blob} */ file, /** @type {string} */ name) {
    const body = new FormData();
    body.append("file", file, name);
    return call("/v1/uploads", { method: "POST", body });
  },
  content: (/** @type {string} */ video, /** @type {string} */ variant) => `${id(video)}/content?variant=${variant}`,
  preview: (/** @type {string} */ video, /** @type {number} */ step) => `${id(video)}/preview?step=${step}`,
  events: (/** @type {string} */ video) => new EventSource(`${id(video)}/events`),
};
