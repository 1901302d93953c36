// Draw a digit: the encoder says where it lies, the decoder what it makes of that, the two terms of the ELBO what it costs.

const [, side] = data.shape, dim = 2, names = data.names;
const noise = bytes(data.noise), draws = floats(data.draws), stored = bytes(data.digits), costs = floats(data.costs);
const encoder = unpacked(data.encoder);
const PEN = 2.6, BOX = 20 - PEN;  // of 28 pixels: MNIST's strokes are about as wide, and its digits fit a box of 20

let strokes = [], digit = 0;  // lists of points (x, y) in pixels; or the number of a stored digit, -1 where the reader draws
let open = false, cursor = [side / 2 - 0.5, side / 2 - 0.5];

// ----- From strokes to an image as MNIST was made: scaled to the box, its centre of mass in pixel (14, 14).

const scratch = element("canvas", {width: side, height: side}).getContext("2d", {willReadFrequently: true});

function trace(pen, scale, [left, top]) {
  pen.beginPath();
  for (const stroke of strokes) {
    stroke.forEach(([x, y], i) => pen[i ? "lineTo" : "moveTo"](scale * x + left, scale * y + top));
    pen.lineTo(scale * stroke[stroke.length - 1][0] + left + 0.01, scale * stroke[stroke.length - 1][1] + top);  // a point is a dot
  }
  pen.lineCap = pen.lineJoin = "round";
  pen.stroke();
}

function drawn(scale, shift) {
  scratch.clearRect(0, 0, side, side);
  scratch.lineWidth = PEN;
  trace(scratch, scale, shift);
  return scratch.getImageData(0, 0, side, side).data.filter((_, i) => i % 4 === 3);
}

function normalized() {
  const ends = [0, 1].map(axis => {
    const values = strokes.flat().map(point => point[axis]);
    return [Math.min(...values), Math.max(...values)];
  });
  const scale = Math.min(BOX / Math.max(...ends.map(([low, high]) => high - low)), 4);
  const shift = ends.map(([low, high]) => (side - scale * (low + high)) / 2);
  const ink = drawn(scale, shift);
  let mass = 0, x = 0, y = 0;
  ink.forEach((level, i) => {
    mass += level;
    x += level * (i % side + 0.5);
    y += level * (Math.floor(i / side) + 0.5);
  });
  return drawn(scale, [shift[0] + (side + 1) / 2 - x / mass, shift[1] + (side + 1) / 2 - y / mass]);  // the middle of pixel 14, from 0
}

// ----- The numbers, in nats.

const softplus = a => Math.max(a, 0) + Math.log1p(Math.exp(-Math.abs(a)));

function measure(x) {
  const head = mlp(encoder, x), mean = head.slice(0, dim);
  const deviation = head.slice(dim).map(logVar => Math.exp(Math.min(Math.max(logVar, -20), 20) / 2));
  let rate = 0, distortion = 0;
  for (let i = 0; i < dim; i++) rate += (mean[i] ** 2 + deviation[i] ** 2 - 1) / 2 - Math.log(deviation[i]);
  for (let k = 0; k < draws.length; k += dim) {
    const logits = mlp(layers, mean.map((value, i) => value + deviation[i] * draws[k + i]));
    logits.forEach((logit, i) => { distortion += (softplus(logit) - x[i] * logit) / (draws.length / dim); });
  }
  return {mean, deviation, rate, distortion};
}

// ----- What is seen.

const board = element("canvas", {
  class: "board", tabindex: 0, role: "application", "aria-roledescription": "drawing board", "aria-describedby": "keys",
  "aria-label": "Drawing board of 28 by 28 pixels. Arrow keys move the pen, Space puts it down and lifts it, Backspace takes a stroke back.",
});
const backdrop = element("canvas", {"aria-hidden": "true"});
const spread = element("canvas", {"aria-hidden": "true"});
const where = element("div", {class: "plane", role: "img", "aria-label": "Latent plane"}, backdrop, spread);
const seen = picture("x, the binary image that the encoder is given"), rebuilt = picture("Reconstruction, decoded from the mean of q");
const said = element("output");
const HOW = "Draw here, or arrow keys and Space.";
const how = element("p", {class: "hint", id: "keys", "aria-live": "polite"}, HOW);

const figures = name => ["rate", "distortion", "sum"].map(key => element("td", {class: `${name} ${key}`}));
const bar = () => element("span", {class: "bar", "aria-hidden": "true"}, element("i"), element("i"));
const rows = {mine: [bar(), figures("mine")], average: [bar(), figures("average")]};
const row = (name, text) => element("tr", {}, element("th", {scope: "row"}, text, rows[name][0]), ...rows[name][1]);
const table = element("table", {},
  element("thead", {}, element("tr", {}, element("th", {scope: "col"}, "nats"), element("th", {scope: "col"}, element("i"), "rate"),
    element("th", {scope: "col"}, element("i"), "distortion"), element("th", {scope: "col"}, "sum, −ELBO"))),
  element("tbody", {}, row("mine", "this image"), row("average", "a test digit, on average")));

function fill(name, values) {
  const [strip, cells] = rows[name], longest = Math.max(1.1 * costs[costs.length - 2], values ? values[0] + values[1] : 0);
  cells.forEach((cell, i) => { cell.textContent = values ? [...values, values[0] + values[1]][i].toFixed(1) : "–"; });
  [...strip.children].forEach((part, i) => { part.style.width = `${values ? 100 * values[i] / longest : 0}%`; });
}

function drawBoard(levels) {
  const wide = Math.round(board.clientWidth * devicePixelRatio), pen = board.getContext("2d"), unit = wide / side;
  board.width = board.height = wide;
  pen.imageSmoothingEnabled = false;
  if (digit >= 0) {
    paint(seen, levels);
    pen.drawImage(seen, 0, 0, wide, wide);
  }
  pen.strokeStyle = "#fff";
  pen.lineWidth = PEN * unit;
  trace(pen, unit, [0, 0]);
  if (board.matches(":focus-visible")) {
    pen.strokeStyle = open ? "#f0a020" : "#56b4e9";
    pen.lineWidth = 0.25 * unit;
    pen.strokeRect((cursor[0] - 0.5) * unit, (cursor[1] - 0.5) * unit, unit, unit);
  }
  if (digit < 0 && !strokes.length) {
    pen.fillStyle = "#bbb";
    pen.textAlign = "center";
    pen.font = `${15 * wide / board.clientWidth}px system-ui, sans-serif`;
    pen.fillText("Draw a digit here", wide / 2, wide / 2);
  }
}

// q in the plane, and under a lens in the corner away from it: its deviations are a hundredth of its width.
function drawSpread(q) {
  const wide = Math.round(where.clientWidth * devicePixelRatio), pen = spread.getContext("2d"), unit = wide / where.clientWidth;
  spread.width = spread.height = wide;
  if (!q) return;
  const scale = wide / 2 / extent, radius = 0.21 * wide;
  const place = [wide / 2 + scale * q.mean[0], wide / 2 - scale * q.mean[1]].map(at => Math.min(Math.max(at, 4 * unit), wide - 4 * unit));
  const corner = place.map(at => (at > wide / 2 ? radius + 3 * unit : wide - radius - 3 * unit));
  const zoom = [16, 8, 4, 2].find(times => 2 * times * scale * Math.max(...q.deviation) < radius) || 1;
  const strokes = (lines, width) => {
    for (const [style, times] of [["--ground", 2.5], ["--ink", 1]]) {
      pen.strokeStyle = colour(style);
      pen.lineWidth = times * width * unit;
      pen.beginPath();
      lines();
      pen.stroke();
    }
  };
  const ellipses = ([x, y], times) => [1, 2].forEach(far => {
    const [a, b] = [...q.deviation].map(value => far * times * value);
    pen.moveTo(x + a, y);
    pen.ellipse(x, y, a, b, 0, 0, 7);
  });
  const circle = ([x, y], r) => { pen.moveTo(x + r, y); pen.arc(x, y, r, 0, 7); };
  const far = Math.hypot(corner[0] - place[0], corner[1] - place[1]), small = Math.max(radius / zoom, 5 * unit);
  const toward = r => [0, 1].map(axis => place[axis] + (corner[axis] - place[axis]) * r / far);
  strokes(() => { pen.moveTo(...toward(small)); pen.lineTo(...toward(far - radius)); }, 1);
  strokes(() => circle(place, small), 1.5);
  if (zoom === 1) return strokes(() => ellipses(place, scale), 1.5);
  pen.save();
  pen.beginPath();
  circle(corner, radius);
  pen.clip();
  pen.fillStyle = colour("--ground");
  pen.fillRect(0, 0, wide, wide);
  for (let i = 0; i < codes.length; i += 2) {
    pen.fillStyle = DOTS[labels[i / 2] % DOTS.length];
    pen.beginPath();
    circle([corner[0] + zoom * scale * (codes[i] - q.mean[0]), corner[1] - zoom * scale * (codes[i + 1] - q.mean[1])], 3 * unit);
    pen.fill();
  }
  strokes(() => ellipses(corner, zoom * scale), 1.5);
  pen.fillStyle = colour("--ink");
  pen.font = `600 ${12 * unit}px system-ui, sans-serif`;
  pen.textAlign = "center";
  pen.fillText(`× ${zoom}`, corner[0], corner[1] + radius - 7 * unit);
  pen.restore();
  strokes(() => circle(corner, radius), 1.5);
}

function show() {
  const empty = digit < 0 && !strokes.length;
  const levels = digit < 0 ? (empty ? new Uint8Array(side * side) : normalized()) : stored.subarray(digit * side * side, (digit + 1) * side * side);
  const x = Float32Array.from(levels, (level, i) => (noise[i] < level ? 1 : 0));
  drawBoard(levels);
  paint(seen, x.map(value => 255 * value));
  const q = empty ? null : measure(x);
  drawSpread(q);
  paint(rebuilt, q ? decode(q.mean) : levels);
  fill("mine", q && [q.rate, q.distortion]);
  fill("average", [data.rate, data.distortion]);
  clearTimeout(later);
  later = setTimeout(say, 300, q);  // a reader is told when the pen rests
}

function say(q) {
  said.textContent = q ? sentence(q) : "Draw a digit, or choose one.";
  where.setAttribute("aria-label", q ? `Latent plane: q has ${spoken(q)}` : "Latent plane: no image yet");
}

const spoken = q => `mean (${[...q.mean].map(signed).join(", ")}) and deviation (${[...q.deviation].map(signed).join(", ")})`;

function sentence(q) {
  const cost = q.rate + q.distortion, below = costs.filter(value => value < cost).length, last = costs.length - 1;
  const rank = below > last ? "more than any test digit" : below ? `more than ${Math.round(100 * (below - 1) / last)} of 100 test digits` : "less than any test digit";
  const what = digit < 0 ? "Your drawing" : `A test digit, ${names[digit]}`;
  return `${what}: q(z | x) has ${spoken(q)}. Rate ${q.rate.toFixed(1)} and distortion ${q.distortion.toFixed(1)} make ${cost.toFixed(1)} nats, ${rank}.`;
}

let asked = 0, later = 0;
function change() {
  cancelAnimationFrame(asked);
  asked = requestAnimationFrame(show);
}

// ----- Pointer, finger and keys.

function begin(point) {
  if (digit >= 0) choose(-1);  // a stroke begins a sheet of its own
  strokes.push([point]);
}

function choose(i) {
  digit = i;
  strokes = [];
  lift();
  document.querySelectorAll("input[name=digit]").forEach((input, other) => { input.checked = other === i; });
  change();
}

function lift(down = false) {
  open = down;
  how.textContent = down ? "The pen is down: arrow keys draw." : HOW;
}

function undo() {
  strokes.pop();
  lift();
  change();
}

function point(event) {
  const box = board.getBoundingClientRect();
  return [side * (event.clientX - box.left) / box.width, side * (event.clientY - box.top) / box.height];
}

let drawing = null;  // the pointer that draws
board.addEventListener("pointerdown", event => {
  if (event.button || drawing !== null) return;
  drawing = event.pointerId;
  board.setPointerCapture(drawing);
  lift();
  begin(point(event));
  change();
});
board.addEventListener("pointermove", event => {
  if (event.pointerId !== drawing) return;
  const events = event.getCoalescedEvents?.() || [];
  strokes[strokes.length - 1].push(...(events.length ? events : [event]).map(point));
  change();
});
["pointerup", "pointercancel"].forEach(kind => board.addEventListener(kind, event => {
  if (event.pointerId === drawing) drawing = null;
}));
board.addEventListener("keydown", event => {
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (way) {
    cursor = cursor.map((value, axis) => Math.min(Math.max(value + way[axis] * (event.shiftKey ? 4 : 1), 0.5), side - 0.5));
    if (open) strokes[strokes.length - 1].push(cursor);
  } else if (event.key === " " && !event.repeat) {
    if (!open) begin(cursor);
    lift(!open);
  } else if (event.key === "Backspace") undo();
  else return;
  event.preventDefault();
  change();
});
["focus", "blur"].forEach(kind => board.addEventListener(kind, change));

const thumbnails = names.map((name, i) => {
  const canvas = picture(`a test digit, ${name}`);
  paint(canvas, stored, i * side * side);
  return canvas;
});
const titled = (title, canvas) => element("div", {}, element("p", {class: "hint", "aria-hidden": "true"}, title), canvas);
place(
  element("div", {class: "draw"}, how, board),
  element("div", {class: "where"}, element("p", {class: "hint"}, "q(z | x), one and two deviations"), where),
  element("div", {class: "pair"}, titled("x, binary", seen), titled("reconstruction", rebuilt)),
  element("div", {class: "tools"}, choices("Or choose a test digit", "digit", thumbnails, digit, [10, 5], choose),
    element("button", {type: "button", onclick: undo}, "Undo"), element("button", {type: "button", onclick: () => choose(-1)}, "Clear")),
  table, said,
);
keepDrawn(where, backdrop, (pen, x, y, unit) => {  // the prior's circles: a draw of it lies inside the first with 39 %, the second with 86 %
  pen.strokeStyle = colour("--muted");
  pen.setLineDash([5 * unit, 4 * unit]);
  for (const times of [1, 2]) {
    pen.beginPath();
    pen.arc(x(0), y(0), x(times) - x(0), 0, 7);
    pen.stroke();
  }
  pen.setLineDash([]);
});
new ResizeObserver(change).observe(board);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", change);
show();
