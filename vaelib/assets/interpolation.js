// Choose two images and slide from the posterior mean of one to that of the other.

const means = floats(data.means), pixels = bytes(data.images), dim = means.length / data.count, size = pixels.length / data.count;
const ends = [0, 1];
let spherical = false;

const nth = index => `${index + 1}${["st", "nd", "rd"][index] ?? "th"}`;
const shown = picture("Decoded image");
const readout = element("output");
const slider = element("input", {type: "range", min: 0, max: 1, step: 0.01, "aria-label": "Position t between the two images", oninput: show});
const strip = element("div", {class: "strip", style: `--columns: ${data.steps}`, "aria-hidden": "true"});
for (let i = 0; i < data.steps; i++) strip.append(picture(""));

// The code at t: on the straight line, or on the great circle (Shoemake 1985, for vectors of unequal length).
function code(t) {
  const [a, b] = ends.map(i => means.subarray(i * dim, (i + 1) * dim));
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const angle = Math.acos(Math.min(1, Math.max(-1, dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)))));
  const onCircle = spherical && Math.sin(angle) > 1e-4;
  const from = onCircle ? Math.sin((1 - t) * angle) / Math.sin(angle) : 1 - t;
  const to = onCircle ? Math.sin(t * angle) / Math.sin(angle) : t;
  return a.map((value, i) => from * value + to * b[i]);
}

function show() {
  paint(shown, decode(code(Number(slider.value))));
  readout.textContent = `${nth(ends[0])} image to ${nth(ends[1])}, t = ${Number(slider.value).toFixed(2)}`;
}

function choose() {
  [...strip.children].forEach((canvas, i) => paint(canvas, decode(code(i / (data.steps - 1)))));
  show();
}

function thumbnails(end) {
  const canvases = Array.from({length: data.count}, (_, i) => picture(`image ${i + 1}`));
  canvases.forEach((canvas, i) => paint(canvas, pixels, i * size));
  return choices(["From", "To"][end], `end${end}`, canvases, ends[end], [data.columns, data.columns], i => { ends[end] = i; choose(); });
}

place(
  element("div", {class: "choices"}, thumbnails(0), thumbnails(1), choices("Path", "path", ["straight", "spherical"], 0, [2, 2], i => {
    spherical = i === 1;
    choose();
  })),
  shown,
  element("div", {class: "slide"}, strip, slider, element("p", {}, readout)),
);
slider.value = 0;
choose();
