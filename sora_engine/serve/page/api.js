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

const ROOT = "/v1/videos";
const id = (/** @type {string} */ video) => `${ROOT}/${encodeURIComponent(video)}`;

/** What a work is to the server: where it is asked for, and with which fields.
 * @typedef {{path: string, fields: object}} Work */

/** A work on a video that the server has. @param {string} video @param {string} kind @param {object} fields
 * @returns {Work} */
export const on = (video, kind, fields) => ({ path: `${id(video)}/${kind}`, fields });

/** A work that names its clips in its fields. @param {string} kind @param {object} fields @returns {Work} */
export const of = (kind, fields) => ({ path: kind ? `${ROOT}/${kind}` : ROOT, fields });

export const api = {
  models: () => call("/v1/models"),
  enter: (/** @type {string} */ key) => post("/session", { key }),
  list: (/** @type {string | null} */ after = null) =>
    call(`${ROOT}?limit=20${after ? `&after=${encodeURIComponent(after)}` : ""}`),
  video: (/** @type {string} */ video) => call(id(video)),
  request: (/** @type {string} */ video) => call(`${id(video)}/request`),
  credentials: (/** @type {string} */ video) => call(`${id(video)}/credentials`),
  plan: (/** @type {Work} */ work) => post(`${work.path}/plan`, work.fields),
  make: (/** @type {Work} */ work) => post(work.path, work.fields),
  cancel: (/** @type {string} */ video) => post(`${id(video)}/cancel`),
  turn: (/** @type {string} */ video, /** @type {number} */ priority) => post(`${id(video)}/priority`, { priority }),
  /** last: the page is being left, and the answer is not waited for. */
  remove: (/** @type {string} */ video, last = false) => call(id(video), { method: "DELETE", keepalive: last }),
  upload(/** @type {Blob} */ file, /** @type {string} */ name) {
    const body = new FormData();
    body.append("file", file, name);
    return call("/v1/uploads", { method: "POST", body });
  },
  uploaded: (/** @type {string} */ upload) => call(`/v1/uploads/${encodeURIComponent(upload)}`),
  content: (/** @type {string} */ video, /** @type {string} */ variant) => `${id(video)}/content?variant=${variant}`,
  preview: (/** @type {string} */ video, /** @type {number} */ step) => `${id(video)}/preview?step=${step}`,
  events: (/** @type {string} */ video) => new EventSource(`${id(video)}/events`),
};
