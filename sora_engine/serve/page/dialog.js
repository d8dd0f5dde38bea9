// @ts-check
// A dialog that asks for what a work needs, tells what it would take, and stays until the server has taken it.

import { api } from "./api.js";
import { Foresight } from "./foresight.js";

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));

/** @typedef {import("./api.js").Work} Work */
/** What is asked for. kind: "text" (several lines), "line", "number", "share" (a slider from 0 to 1), "seed". spare: it may be
 * left empty. least: of a number.
 * @typedef {{name: string, label: string, value: string, kind: string, hint?: string, least?: number, spare?: boolean}} Field */

const fail = (/** @type {HTMLElement} */ place) => (/** @type {unknown} */ error) => {
  place.textContent = error instanceof Error ? error.message : String(error);
};

/** Opens a dialog and begins what its form says once that is confirmed.
 * @param {HTMLDialogElement} dialog @param {{plan: HTMLElement, problem: HTMLElement, yes: HTMLButtonElement}} parts
 * @param {() => Work | null | Promise<Work | null>} foreseen what a plan is asked for @param {() => Promise<any>} begin throws what is shown
 * @returns {Promise<any>} what `begin` gave; null where it was left */
export function confirmed(dialog, parts, foreseen, begin) {
  const form = /** @type {HTMLFormElement} */ (dialog.querySelector("form"));
  let ofPlan = false; // whether the problem shown is the plan's, which the next plan takes away
  const foresight = new Foresight(parts.plan, () => (form.checkValidity() ? foreseen() : null), {
    failed: (error) => { fail(parts.problem)(error); ofPlan = true; },
    went: () => { if (ofPlan) parts.problem.textContent = ""; },
  });
  parts.problem.textContent = "";
  parts.plan.textContent = "";
  return new Promise((resolve) => {
    let result = null;
    form.oninput = () => foresight.soon();
    form.onsubmit = async (event) => {
      if (/** @type {any} */ (event.submitter)?.value === "no") return;
      event.preventDefault();
      parts.yes.disabled = true;
      ofPlan = false;
      parts.problem.textContent = "";
      try {
        result = await begin();
        dialog.close();
      } catch (error) {
        fail(parts.problem)(error);
      } finally {
        parts.yes.disabled = false;
      }
    };
    dialog.onclose = () => { foresight.stop(); resolve(result); };
    dialog.showModal();
    foresight.now();
  });
}

/** Asks for fields, and makes the work of them. @param {string} name @param {Field[]} fields
 * @param {(given: any) => Work} work @returns {Promise<any>} the job; null where it was left */
export function ask(name, fields, work) {
  const place = $("ask-fields");
  $("ask-name").textContent = name;
  $("ask-yes").textContent = name;
  place.replaceChildren(...fields.map(row));
  const given = () => work(Object.fromEntries(fields.map((field) => {
    const { value } = place.querySelector(`[name=${field.name}]`);
    return [field.name, field.kind === "text" || field.kind === "line" ? value : Number(value)];
  })));
  const parts = { plan: $("ask-plan"), problem: $("ask-problem"), yes: $("ask-yes") };
  return confirmed($("ask"), parts, given, () => api.make(given()));
}

/** @param {Field} field */
function row(field) {
  const label = document.createElement("label");
  const input = /** @type {any} */ (document.createElement(field.kind === "text" ? "textarea" : "input"));
  label.append(Object.assign(document.createElement("span"), { textContent: field.label }));
  Object.assign(input, { name: field.name, required: !field.spare });
  if (field.kind === "number") Object.assign(input, { type: "number", min: String(field.least ?? 0.1), step: "any" });
  if (field.kind === "seed") Object.assign(input, { inputMode: "numeric", pattern: "[0-9]+" });
  if (field.kind === "share") Object.assign(input, { type: "range", min: "0.05", max: "1", step: "0.05" });
  input.value = field.value;
  label.append(input);
  if (field.kind === "share") {
    const told = document.createElement("output");
    input.addEventListener("input", () => { told.textContent = input.value; });
    told.textContent = input.value;
    label.append(told);
    label.classList.add("share");
  }
  if (field.hint) {
    const hint = document.createElement("span");
    Object.assign(hint, { className: "quiet", textContent: field.hint });
    label.append(hint);
  }
  return label;
}
