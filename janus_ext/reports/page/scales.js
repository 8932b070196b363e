// Axes: what their ends and ticks are, where labels go, how wide a text is.

const measure = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  measure.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
  return measure.measureText(text).width;
}

/** Round numbers from at most `low` to at least `high`, about `wanted` of them. */
function linearTicks(low, high, wanted = 6) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((multiple) => multiple * power >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9),
    last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: Math.max(last, first + 1) - first + 1 }, (_, i) => (first + i) * step);
}

/** An axis over `values`; `options` may fix its ends (low, high). */
function linearAxis(values, options = {}) {
  const ticks = linearTicks(options.low ?? Math.min(...values), options.high ?? Math.max(...values));
  const [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const step = ticks[1] - ticks[0];
  const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  return { ticks, label: fixed(digits), at: (value) => (value - low) / (high - low) };
}

/** The same by powers of ten; what is not positive lies at the lower end. */
function logAxis(values) {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) positive.push(1e-12); // all of them lie at the lower end
  const least = Math.floor(Math.log10(Math.min(...positive)));
  const high = Math.max(least + 1, Math.ceil(Math.log10(Math.max(...positive))));
  const every = Math.ceil((high - least) / 6);
  const low = high - every * Math.ceil((high - least) / every);
  const ticks = [];
  for (let power = low; power <= high; power += every) {
    ticks.push(10 ** power);
    if (high - low <= 2 && power < high) ticks.push(2 * 10 ** power, 5 * 10 ** power);
  }
  const at = (value) => Math.max(0, (Math.log10(Math.max(value, 1e-300)) - low) / (high - low));
  return { ticks, label: powerLabel, at };
}

function powerLabel(value) {
  const power = Math.floor(Math.log10(value) + 1e-9);
  const factor = Math.round(value / 10 ** power);
  return (factor === 1 ? "" : `${factor}·`) + `10${superscript(power)}`;
}

/** Tasks 1..last that have room for a number of about `width` pixels each. */
function taskTicks(last, pixels, width = 22) {
  const every = [1, 2, 5, 10, 20, 50, 100].find((step) => (last / step) * width <= pixels) ?? last;
  return Array.from({ length: last }, (_, i) => i + 1).filter((task) => task % every === 0 || task === 1);
}

/** `heights`, moved as little as it takes to be `least` apart between `top` and `bottom`. */
function apart(heights, least, top, bottom) {
  const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]);
  const moved = [...heights];
  let floor = top;
  for (const i of order) floor = (moved[i] = Math.max(moved[i], floor)) + least;
  let ceiling = bottom;
  for (const i of order.reverse()) ceiling = (moved[i] = Math.min(moved[i], ceiling)) - least;
  return moved;
}

/** Redraws a picture whenever the width of its box changes. */
function drawnAtWidth(box, picture) {
  let width = 0;
  const redraw = () => {
    const now = Math.floor(box.clientWidth);
    if (now > 0 && now !== width) picture((width = now));
  };
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(box); // a picture may change what is observed
}
