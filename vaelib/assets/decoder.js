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

// Weights come as float32, or as whole numbers of 8 or 16 bits with one scale for each row.
const unpacked = layers => layers.map(({weight, bits, bias, scale}) => {
  const b = floats(bias);
  if (!scale) return {weight: floats(weight), bias: b};
  const whole = new (bits === 16 ? Int16Array : Int8Array)(bytes(weight).buffer);
  const scales = floats(scale), fanIn = whole.length / b.length;
  return {weight: Float32Array.from(whole, (value, i) => value * scales[Math.floor(i / fanIn)]), bias: b};
});

// What the last layer gives, without an activation.
function mlp(layers, input) {
  let h = Float32Array.from(input);
  layers.forEach(({weight, bias}, depth) => {
    const out = new Float32Array(bias.length), last = depth === layers.length - 1;
    for (let row = 0, i = 0; row < out.length; row++) {
      let sum = bias[row];
      for (let column = 0; column < h.length; column++, i++) sum += weight[i] * h[column];
      out[row] = last ? sum : activation(sum);
    }
    h = out;
  });
  return h;
}

const layers = unpacked(data.layers);
const decode = z => mlp(layers, z).map(logit => 255 / (1 + Math.exp(-logit)));
