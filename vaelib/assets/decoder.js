// The model's decoder, an MLP: z (L numbers) -> the Bernoulli mean as levels 0..255, laid out (C, H, W).

// The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26): gelu(x) = x (1 + erf(x / sqrt 2)) / 2.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const activation = {
  relu: x => Math.max(x, 0),
  leaky_relu: x => (x < 0 ? 0.01 * x : x),
  tanh: Math.tanh,
  gelu: x => x * 0.5 * (1 + erf(x / Math.SQRT2)),
  silu: x => x / (1 + Math.exp(-x)),
}[data.activation];

// Weights come as float32, or as int8 with one scale for each row.
const layers = data.layers.map(({weight, bias, scale}) => {
  const b = floats(bias);
  if (!scale) return {weight: floats(weight), bias: b};
  const whole = new Int8Array(bytes(weight).buffer), scales = floats(scale), fanIn = whole.length / b.length;
  return {weight: Float32Array.from(whole, (value, i) => value * scales[Math.floor(i / fanIn)]), bias: b};
});

function decode(z) {
  let h = Float32Array.from(z);
  layers.forEach(({weight, bias}, depth) => {
    const out = new Float32Array(bias.length), last = depth === layers.length - 1;
    for (let row = 0, i = 0; row < out.length; row++) {
      let sum = bias[row];
      for (let column = 0; column < h.length; column++, i++) sum += weight[i] * h[column];
      out[row] = last ? 255 / (1 + Math.exp(-sum)) : activation(sum);
    }
    h = out;
  });
  return h;
}
