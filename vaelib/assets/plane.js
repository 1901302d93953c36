// The latent plane as a picture: the codes as dots, each class named at its median; without codes the plane itself, decoded.

const extent = data.extent;
const DOTS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#8c564b", "#9467bd", "#bcbd22"];
const codes = data.codes && floats(data.codes), labels = bytes(data.labels || "");
const median = values => values.sort((a, b) => a - b)[values.length >> 1];
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name);

// Draws it on a canvas as large as `plane`, anew when its size or the colour scheme changes; `more(pen, x, y, unit)` lies between dots and names.
function keepDrawn(plane, canvas, more = () => {}) {
  const draw = () => drawPlane(plane, canvas, more);
  new ResizeObserver(draw).observe(plane);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

function drawPlane(plane, canvas, more) {
  const side = Math.round(plane.clientWidth * devicePixelRatio), pen = canvas.getContext("2d");
  const x = value => (value / extent + 1) * side / 2, y = value => side - x(value), unit = side / plane.clientWidth;
  canvas.width = canvas.height = side;
  if (!codes) drawMap(pen, side);
  const write = (text, left, top) => {
    const width = pen.measureText(text).width + 8 * unit;
    pen.fillStyle = colour("--ground");
    pen.fillRect(left - width / 2, top - 9 * unit, width, 18 * unit);
    pen.fillStyle = colour("--ink");
    pen.fillText(text, left, top);
  };
  pen.font = `${12 * unit}px system-ui, sans-serif`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  if (codes) {
    pen.strokeStyle = colour("--line");
    for (let tick = Math.ceil(-extent); tick <= extent; tick++) {
      pen.strokeRect(x(tick), -1, 0, side + 2);
      pen.strokeRect(-1, y(tick), side + 2, 0);
    }
    pen.globalAlpha = 0.45;
    for (let i = 0; i < codes.length; i += 2) {
      pen.fillStyle = labels.length ? DOTS[labels[i / 2] % DOTS.length] : colour("--muted");
      pen.beginPath();
      pen.arc(x(codes[i]), y(codes[i + 1]), 1.7 * unit, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
    more(pen, x, y, unit);
    data.classes.forEach((name, label) => {
      const mine = [...codes.keys()].filter(i => i % 2 === 0 && labels[i / 2] === label);
      write(name, x(median(mine.map(i => codes[i]))), y(median(mine.map(i => codes[i + 1]))));
    });
  }
  for (let tick = Math.ceil(-extent); tick <= extent; tick++) {
    if (tick > -extent + 0.3 && tick < extent - 0.3) write(signed(tick).slice(0, -3), x(tick), side - 10 * unit);
    if (tick > -extent + 0.3 && tick < extent - 0.3) write(signed(tick).slice(0, -3), 12 * unit, y(tick));
  }
  write("z₁", side - 13 * unit, side - 10 * unit);
  write("z₂", 12 * unit, 12 * unit);
}

function drawMap(pen, side) {
  const cells = 15, tile = picture("");
  pen.imageSmoothingEnabled = true;
  for (let row = 0; row < cells; row++) {
    for (let column = 0; column < cells; column++) {
      paint(tile, decode([extent * (2 * (column + 0.5) / cells - 1), extent * (1 - 2 * (row + 0.5) / cells)]));
      pen.drawImage(tile, column * side / cells, row * side / cells, side / cells, side / cells);
    }
  }
}
