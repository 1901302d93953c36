// Small pieces that every figure uses.

// An element of the page: attributes by name, "on..." names a listener; children are elements or text.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const place = (...children) => document.querySelector("main").append(...children);
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const floats = text => new Float32Array(bytes(text).buffer);
const signed = number => (number < 0 ? "−" : "") + Math.abs(number).toFixed(2);

// A canvas of the image's own size; the style sheet enlarges it without smoothing.
function picture(label) {
  const [, height, width] = data.shape;
  return element("canvas", {width, height, role: "img", "aria-label": label, class: "picture"});
}

// Write levels 0..255, laid out (C, H, W) from `start` on, to a canvas; the array rounds and clamps them.
function paint(canvas, levels, start = 0) {
  const [channels, height, width] = data.shape;
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = levels[start + (channels === 3 ? c : 0) * height * width + i];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Radio buttons, so that Tab, arrow keys and screen readers work as everywhere; `contents` are canvases or words.
function choices(legend, name, contents, chosen, [wide, narrow], onchoice) {
  const words = typeof contents[0] === "string" ? "words" : "images";
  const labels = contents.map((content, i) => {
    const input = element("input", {type: "radio", name, value: i, onchange: () => onchoice(i)});
    input.checked = i === chosen;
    return element("label", {class: "choice"}, input, content);
  });
  const style = `--columns: ${wide}; --narrow: ${narrow}`;
  return element("fieldset", {class: words, style}, element("legend", {}, legend), ...labels);
}
