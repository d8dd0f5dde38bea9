// @ts-check
// A mask that is painted on the first frame: white where the video is made anew.

const $ = (/** @type {string} */ name) => /** @type {any} */ (document.getElementById(name));

/** Asks for a mask and a prompt. @param {string} picture @param {number} width @param {number} height
 * @param {string} prompt @returns {Promise<{mask: Blob, prompt: string} | null>} */
export function paint(picture, width, height, prompt) {
  const dialog = $("brush"), canvas = $("brush-canvas"), size = $("brush-size");
  const pen = canvas.getContext("2d");
  const at = { x: width / 2, y: height / 2 };
  canvas.width = width;
  canvas.height = height;
  $("brush-picture").src = picture;
  $("brush-picture").style.width = `${(45 * width) / height}vh`; // small videos are painted large
  $("brush-prompt").value = prompt;
  pen.fillStyle = "#fff";
  let painted = false;
  const dot = () => {
    pen.beginPath();
    pen.arc(at.x, at.y, (Number(size.value) / 400) * Math.max(width, height), 0, 7);
    pen.fill();
    painted = true;
  };
  canvas.onpointerdown = canvas.onpointermove = (/** @type {PointerEvent} */ event) => {
    if (!event.buttons) return;
    const box = canvas.getBoundingClientRect();
    at.x = ((event.clientX - box.left) / box.width) * width;
    at.y = ((event.clientY - box.top) / box.height) * height;
    dot();
  };
  canvas.onkeydown = (/** @type {KeyboardEvent} */ event) => {
    const by = Math.max(1, width / 40);
    const [x, y] = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key] ?? [0, 0];
    if (event.key === " ") dot();
    else if (!x && !y) return;
    event.preventDefault();
    at.x = Math.min(width, Math.max(0, at.x + x));
    at.y = Math.min(height, Math.max(0, at.y + y));
  };
  $("brush-clear").onclick = () => { pen.clearRect(0, 0, width, height); painted = false; };
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      if (dialog.returnValue !== "yes" || !painted) return resolve(null);
      const mask = document.createElement("canvas");
      mask.width = width;
      mask.height = height;
      const out = /** @type {CanvasRenderingContext2D} */ (mask.getContext("2d"));
      out.fillStyle = "#000";
      out.fillRect(0, 0, width, height);
      out.drawImage(canvas, 0, 0);
      mask.toBlob((blob) => resolve(blob && { mask: blob, prompt: $("brush-prompt").value }));
    };
  });
}
