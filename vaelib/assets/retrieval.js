// Choose a query and a distance; see the nearest images of the gallery. All neighbours were computed beforehand.

const [, height, width] = data.shape, columns = 32;
let query = 0, distance = 0;

const status = element("output");
const neighbours = element("ol", {class: "neighbours", style: "--columns: 8; --narrow: 4"});

// Cut one image out of the atlas, in which queries come first.
const atlas = new Image();
function cut(canvas, i) {
  const left = (i % columns) * width, top = Math.floor(i / columns) * height;
  canvas.getContext("2d").drawImage(atlas, left, top, width, height, 0, 0, width, height);
  return canvas;
}

function show() {
  const found = data.neighbours[distance][query], wanted = data.queryLabels[query];
  let same = 0;
  neighbours.replaceChildren(...found.map((i, rank) => {
    const mine = data.galleryLabels[i], differs = wanted !== undefined && mine !== wanted;
    same += !differs;
    const canvas = cut(picture(`neighbour ${rank + 1}`), data.count + i);
    const text = mine === undefined ? String(rank + 1) : differs ? `✗ ${mine}` : mine;
    return element("li", {class: differs ? "differs" : "same"}, canvas, text);
  }));
  const title = wanted === undefined ? `Query ${query + 1}` : `Query ${query + 1}: ${wanted}`;
  const score = wanted === undefined ? "" : ` ${same} of ${found.length} neighbours share its label; ✗ marks the others.`;
  status.textContent = `${title}.${score}`;
}

atlas.onload = () => {
  const canvases = Array.from({length: data.count}, (_, i) => {
    const name = data.queryLabels[i];
    return cut(picture(name === undefined ? `query ${i + 1}` : `query ${i + 1}: ${name}`), i);
  });
  place(
    choices("Query", "query", canvases, query, [12, 6], i => { query = i; show(); }),
    choices("Distance", "distance", data.names, distance, [data.names.length, Math.min(data.names.length, 2)], i => { distance = i; show(); }),
    status, neighbours,
  );
  show();
};
atlas.src = "data:image/png;base64," + data.atlas;
