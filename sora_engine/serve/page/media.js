// @ts-check
// Files of the reader's own, as the browser shows them.

/** The first frame of a picture or a clip, as an address; null where the browser cannot show it.
 * @param {Blob} file @returns {Promise<string | null>} */
export async function firstFrame(file) {
  const address = URL.createObjectURL(file);
  if (file.type.startsWith("image/")) return address;
  const film = document.createElement("video");
  Object.assign(film, { muted: true, preload: "auto", src: address });
  const there = await new Promise((resolve) => {
    film.onloadeddata = () => resolve(true);
    film.onerror = () => resolve(false);
  });
  let frame = null;
  if (there) {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: film.videoWidth, height: film.videoHeight });
    canvas.getContext("2d")?.drawImage(film, 0, 0);
    frame = /** @type {Blob | null} */ (await new Promise((resolve) => canvas.toBlob(resolve)));
  }
  URL.revokeObjectURL(address);
  return frame && URL.createObjectURL(frame);
}

/** @type {Map<string, string>} */
const frames = new Map();

/** Keeps the first frame of an upload for as long as the page is open. @param {string} upload @param {string | null} frame */
export const keep = (upload, frame) => { if (frame) frames.set(upload, frame); };

/** That frame, where it is known. @param {string | undefined} upload */
export const frameOf = (upload) => (upload && frames.get(upload)) || null;
