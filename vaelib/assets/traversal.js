// One slider for each of a few latent dimensions; the others stay at the image's code.

const start = floats(data.code), z = Float32Array.from(start);
const shown = picture("Decoded image"), original = picture("The image whose code is the start");
const status = element("output", {class: "hint"}, "The image's own code.");

const rows = data.units.map(unit => {
  // the track is longer where the image's own code lies outside it
  const limits = {min: Math.min(-data.span, start[unit]), max: Math.max(data.span, start[unit])};
  const name = `z[${unit}]`, value = element("span", {"aria-hidden": "true"});
  const slider = element("input", {type: "range", ...limits, step: "any", "aria-label": name, oninput: () => set(Number(slider.value))});
  const write = () => {
    value.textContent = signed(z[unit]);
    slider.setAttribute("aria-valuetext", `${name} = ${signed(z[unit])}`);
  };
  const set = to => {
    z[unit] = to;
    write();
    paint(shown, decode(z));
    status.textContent = `${name} = ${signed(to)}`;
  };
  const reset = () => {
    slider.value = z[unit] = start[unit];
    write();
  };
  reset();
  return {reset, row: element("div", {class: "slider"}, element("span", {"aria-hidden": "true"}, name), slider, value)};
});

function reset() {
  rows.forEach(row => row.reset());
  paint(shown, decode(z));
  status.textContent = "The image's own code.";
}

place(shown, element("div", {}, ...rows.map(({row}) => row), element("div", {class: "start"},
  original, element("button", {type: "button", onclick: reset}, "Reset"), status)));
paint(original, bytes(data.image));
reset();
