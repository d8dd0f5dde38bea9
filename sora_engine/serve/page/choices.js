// @ts-check
// What only some models have: adapters, ladders of few steps, a second expert, classes.

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));

/** The choice of no ladder where the model has one of its own. */
export const OFF = "off";

/** Offers what the model has, and hides the rest. @param {any} model @param {() => void} changed */
export function offer(model, changed) {
  const list = $("loras");
  list.hidden = !model.loras.length;
  list.querySelectorAll(".row").forEach((/** @type {Element} */ row) => row.remove());
  for (const name of model.loras) {
    const row = document.createElement("div"), label = document.createElement("label");
    const used = document.createElement("input"), strength = document.createElement("input");
    row.className = "row";
    label.className = "check";
    Object.assign(used, { type: "checkbox", name });
    Object.assign(strength, { type: "number", step: "0.05", value: "1" });
    strength.setAttribute("aria-label", `Strength of ${name}`);
    label.append(used, name);
    row.append(label, strength);
    row.addEventListener("change", changed);
    list.append(row);
  }
  const ladders = model.ladders ?? [];
  const own = model.defaults.ladder;
  $("ladder").replaceChildren(
    new Option(own ? `the model's (${own})` : "none", ""),
    ...ladders.filter((/** @type {string} */ name) => name !== own).map((/** @type {string} */ name) => new Option(name, name)),
    ...(own ? [new Option("none, any number of steps", OFF)] : []));
  $("ladder").closest("label").hidden = !ladders.length;
  $("guidance2").closest("label").hidden = (model.experts ?? 1) < 2;
  $("label").closest("label").hidden = !model.labels;
  $("classes").replaceChildren(...Object.keys(model.labels?.names ?? {}).map((name) => new Option(name, name)));
}

/** The adapters that are ticked, with their strengths. @returns {{name: string, strength: number}[]} */
export function adapters() {
  return [...$("loras").querySelectorAll(".row")]
    .filter((row) => row.querySelector("[type=checkbox]").checked)
    .map((row) => ({
      name: row.querySelector("[type=checkbox]").name,
      strength: Number(row.querySelector("[type=number]").value) || 0,
    }));
}

/** Ticks adapters as a form that was kept has them. @param {unknown} kept */
export function tick(kept) {
  const strengths = new Map(Array.isArray(kept) ? kept.map((one) => [one?.name, one?.strength]) : []);
  for (const row of $("loras").querySelectorAll(".row")) {
    const used = row.querySelector("[type=checkbox]");
    used.checked = strengths.has(used.name);
    if (used.checked) row.querySelector("[type=number]").value = String(Number(strengths.get(used.name) ?? 1));
  }
}
