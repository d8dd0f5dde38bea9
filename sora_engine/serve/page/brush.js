// @ts-check
// A mask that is painted on the first frame: white where the video is made anew.

import { confirmed } from "./dialog.js";

/** @typedef {import("./api.js").Work} Work */

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));
/** The brush's own colour, which few pictures have. */
const PAINT = "#e0007a";

/** Asks for a mask and a prompt, and begins the work. size: width and height of the mask.
 * @param {{picture: string, size: number[], prompt: string, foresee: (mask: Blob) => Promise<Work>,
 *   begin: (mask: Blob, prompt: string) => Promise<any>}} source @returns {Promise<any>} the job; null where it was left */
export async function paint({ picture, size: [width, height], prompt, foresee, begin }) {
  const canvas = $("brush-canvas"), size = $("brush-size"), mark = $("brush-at");
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const at = { x: width / 2, y: height / 2 };
  Object.assign(canvas, { width, height });
  $("brush-picture").src = picture;
  canvas.parentElement.style.width = `${(45 * width) / height}vh`; // small videos are painted large
  $("brush").querySelector("form").reset(); // of what was asked before, and its marks
  $("brush-prompt").value = prompt;
  const radius = () => (Number(size.value) / 400) * Math.max(width, height);
  const show = () => {
    mark.style.left = `${(100 * at.x) / width}%`;
    mark.style.top = `${(100 * at.y) / height}%`;
    mark.style.width = `${(200 * radius()) / width}%`;
  };
  /** A stroke to where the brush is: a quick hand leaves no gaps. */
  const stroke = (from = at) => {
    pen.globalCompositeOperation = $("brush-erase").checked ? "destination-out" : "source-over";
    Object.assign(pen, { strokeStyle: PAINT, lineWidth: 2 * radius(), lineCap: "round" });
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(at.x, at.y);
    pen.stroke();
    if (isPainted(pen, width, height)) $("brush-problem").textContent = "";
  };
  canvas.onpointerdown = canvas.onpointermove = (/** @type {PointerEvent} */ event) => {
    const box = canvas.getBoundingClientRect(), from = event.type === "pointermove" ? { ...at } : undefined;
    at.x = ((event.clientX - box.left) / box.width) * width;
    at.y = ((event.clientY - box.top) / box.height) * height;
    show();
    if (event.buttons) stroke(from);
  };
  canvas.onkeydown = (/** @type {KeyboardEvent} */ event) => {
    const by = Math.max(1, width / 40);
    const [x, y] = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key] ?? [0, 0];
    if (event.key === " ") stroke();
    else if (!x && !y) return;
    event.preventDefault();
    at.x = Math.min(width, Math.max(0, at.x + x));
    at.y = Math.min(height, Math.max(0, at.y + y));
    show();
  };
  size.oninput = show;
  $("brush-clear").onclick = () => pen.clearRect(0, 0, width, height);
  show();
  // Which part is painted changes nothing of what it takes: a corner stands for it until it is there.
  const foreseen = blobOf(width, height, (out) => out.fillRect(0, 0, width / 2, height / 2)).then(foresee);
  foreseen.catch(() => {}); // told where it is waited for
  const work = async () => {
    const { path, fields } = await foreseen;
    return { path, fields: { ...fields, prompt: $("brush-prompt").value } };
  };
  const parts = { plan: $("brush-plan"), problem: $("brush-problem"), yes: $("brush-yes") };
  return confirmed($("brush"), parts, work, async () => {
    if (!isPainted(pen, width, height)) {
      canvas.focus();
      throw new Error("nothing is painted yet: draw over the part of the picture that is to be made anew");
    }
    return begin(await blobOf(width, height, (out) => out.drawImage(canvas, 0, 0)), $("brush-prompt").value);
  });
}

/** @param {CanvasRenderingContext2D} pen @param {number} width @param {number} height */
const isPainted = (pen, width, height) =>
  pen.getImageData(0, 0, width, height).data.some((value, n) => n % 4 === 3 && value > 127);

/** A mask as a picture: white where something was drawn.
 * @param {number} width @param {number} height @param {(out: CanvasRenderingContext2D) => void} draw
 * @returns {Promise<Blob>} */
function blobOf(width, height, draw) {
  const mask = document.createElement("canvas");
  Object.assign(mask, { width, height });
  const out = /** @type {CanvasRenderingContext2D} */ (mask.getContext("2d"));
  draw(out);
  out.globalCompositeOperation = "source-in";
  out.fillStyle = "#fff";
  out.fillRect(0, 0, width, height);
  out.globalCompositeOperation = "destination-over";
  out.fillStyle = "#000";
  out.fillRect(0, 0, width, height);
  return new Promise((resolve) => mask.toBlob((blob) => resolve(/** @type {Blob} */ (blob))));
}
