// Numbers -> pixels on a canvas.

// The ends of the library's signed colours: red raises a value, blue lowers it.
const ENDS = {
  light: { raises: [178, 24, 43], lowers: [33, 102, 172], zero: [250, 250, 250] },
  dark: { raises: [255, 104, 96], lowers: [88, 170, 255], zero: [24, 25, 30] },
};

/** Whether the page is dark. */
export const isDark = () => document.documentElement.dataset.theme === "dark";

/** The three colours of signed numbers. */
export const ends = () => ENDS[isDark() ? "dark" : "light"];

/** A colour of the page's style. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The largest magnitude, so that a few large numbers do not hide the others. */
export function limitOf(data) {
  const sizes = Float32Array.from(data, Math.abs).filter((v) => v > 0).sort();
  if (!sizes.length) return 1;
  return sizes[Math.min(sizes.length - 1, Math.floor(0.995 * sizes.length))];
}

/** The largest magnitude. */
export function largest(data) {
  let most = 0;
  for (const v of data) most = Math.max(most, Math.abs(v));
  return most || 1;
}

/** Put a signed number into an image at a place. */
function putSigned(pixels, at, share, { raises, lowers, zero }) {
  const strength = Math.min(1, Math.abs(share)) ** 0.8;
  const end = share > 0 ? raises : lowers;
  for (let c = 0; c < 3; c++) pixels[at + c] = zero[c] + (end[c] - zero[c]) * strength;
  pixels[at + 3] = 255;
}

/** A signed map as an image: white is zero, red positive, blue negative. */
export function signed(map, rows, columns, limit) {
  const image = new ImageData(columns, rows);
  const three = ends();
  for (let i = 0; i < rows * columns; i++) putSigned(image.data, 4 * i, map[i] / limit, three);
  return image;
}

/** A map of three channels in its own colours: grey is zero. */
export function coloured(map, rows, columns, limit) {
  const image = new ImageData(columns, rows);
  const n = rows * columns;
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 * (0.5 + map[c * n + i] / (2 * limit));
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** Pixels in [0, 1], (channels, rows, columns), as an image. */
export function photo(pixels, channels, rows, columns) {
  const image = new ImageData(columns, rows);
  const n = rows * columns;
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 * pixels[(channels === 3 ? c : 0) * n + i];
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** A signed map over a grey photo: opaque where it is large. */
export function over(pixels, channels, map, rows, columns, limit) {
  const image = new ImageData(columns, rows);
  const n = rows * columns;
  const { raises, lowers } = ENDS.light;
  for (let i = 0; i < n; i++) {
    let grey = 0;
    for (let c = 0; c < channels; c++) grey += pixels[c * n + i] / channels;
    const share = Math.min(1, Math.abs(map[i]) / limit);
    const end = map[i] > 0 ? raises : lowers;
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = end[c] * share + 255 * (0.3 + 0.7 * grey) * (1 - share);
    }
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** The sum over channels. */
export function summed(map, channels, n) {
  const sum = new Float32Array(n);
  for (let c = 0; c < channels; c++) for (let i = 0; i < n; i++) sum[i] += map[c * n + i];
  return sum;
}

/** The product of two arrays. */
export const product = (a, b) => a.map((v, i) => v * b[i]);

/** An image as a canvas of its own size, to be drawn larger. */
export function small(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Draw an image into a rectangle, each pixel as a square. */
export function put(context, image, x, y, width, height) {
  context.imageSmoothingEnabled = false;
  context.drawImage(small(image), x, y, width, height);
}

/** Fit a canvas to its size on the screen; returns its context and size in the page's pixels. */
export function fitted(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { width, height } = canvas.getBoundingClientRect();
  const w = Math.max(1, Math.round(width * ratio));
  const h = Math.max(1, Math.round(height * ratio));
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** The logarithm of the magnitudes of the Fourier transform, zero frequency in the centre. */
export function spectrum(map, rows, columns) {
  // along rows, then along columns: each is a sum over one axis
  const along = (re, im, count, length, at) => {
    const outRe = new Float32Array(re.length);
    const outIm = new Float32Array(re.length);
    for (let k = 0; k < length; k++) {
      for (let n = 0; n < length; n++) {
        const angle = (-2 * Math.PI * ((k * n) % length)) / length;
        const cos = Math.cos(angle);
        const sin = Math.sin(angle);
        for (let i = 0; i < count; i++) {
          const a = at(i, n);
          const b = at(i, k);
          outRe[b] += re[a] * cos - im[a] * sin;
          outIm[b] += re[a] * sin + im[a] * cos;
        }
      }
    }
    return [outRe, outIm];
  };
  let [re, im] = along(map, new Float32Array(map.length), rows, columns, (i, n) => i * columns + n);
  [re, im] = along(re, im, columns, rows, (i, n) => n * columns + i);
  const size = new Float32Array(map.length);
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const from = ((r + ((rows + 1) >> 1)) % rows) * columns + ((c + ((columns + 1) >> 1)) % columns);
      size[r * columns + c] = Math.hypot(re[from], im[from]);
    }
  }
  return size;
}

/** Magnitudes on a logarithmic scale of four decades, from the page's zero to its accent. */
export function magnitudes(map, rows, columns) {
  const image = new ImageData(columns, rows);
  const top = Math.log10(largest(map));
  const zero = ends().zero;
  const end = isDark() ? [167, 157, 247] : [52, 41, 150];
  for (let i = 0; i < map.length; i++) {
    const share = Math.max(0, Math.min(1, 1 + (Math.log10(map[i] + 1e-30) - top) / 4));
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = zero[c] + (end[c] - zero[c]) * share;
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** A number in a few characters. */
export function short(v, digits = 4) {
  if (v === 0) return "0";
  const text = Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6 ? v.toExponential(Math.max(1, digits - 3)) : String(Number(v.toPrecision(digits)));
  return text.replaceAll("-", "−");
}

/** A number with its sign. */
export const withSign = (v, digits = 3) => (v >= 0 ? "+" : "") + short(v, digits);
