// Move over the latent plane; the decoder draws what lies there.

const z = [0, 0];
const shown = picture("Decoded image");
const readout = element("output");
const backdrop = element("canvas", {"aria-hidden": "true"});
const marker = element("span", {class: "marker"});
const plane = element("div", {
  class: "plane", tabindex: 0, role: "application", "aria-roledescription": "latent plane",
  "aria-label": "Latent plane, z1 across and z2 up. Arrow keys move, with Shift in big steps, Home goes to the middle.",
}, backdrop, marker);

function move(first, second) {
  [first, second].forEach((value, axis) => { z[axis] = Math.min(extent, Math.max(-extent, value)); });
  paint(shown, decode(z));
  marker.style.left = `${50 + 50 * z[0] / extent}%`;
  marker.style.top = `${50 - 50 * z[1] / extent}%`;
  readout.textContent = `z = (${signed(z[0])}, ${signed(z[1])})`;
}

function follow(event) {
  const box = plane.getBoundingClientRect();
  move(extent * (2 * (event.clientX - box.left) / box.width - 1), extent * (1 - 2 * (event.clientY - box.top) / box.height));
}
plane.addEventListener("pointerdown", follow);
plane.addEventListener("pointermove", follow);
plane.addEventListener("keydown", event => {
  const step = extent * (event.shiftKey ? 0.2 : 0.02);
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1]}[event.key];
  if (way) move(z[0] + step * way[0], z[1] + step * way[1]);
  else if (event.key === "Home") move(0, 0);
  else return;
  event.preventDefault();
});

place(plane, shown, element("p", {class: "hint"}, "Point, drag or use the arrow keys (Shift: big steps)."), readout);
keepDrawn(plane, backdrop);
move(0, 0);
