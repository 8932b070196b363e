// A chart of lines over tasks with bands of one standard deviation, and what a pointer or the arrow keys show of it.

const MOST_SHOWN = 14; // values in the box beside the pointer

/**
 * `chart`: {title, note, form, axis: values -> axis, series, epochs: true where a place is the end of an epoch}. A
 * series is {name, style, places, mean, std, rounded, bound, quiet}: `bound` marks a method that learns all at once,
 * whose one number is a line across, and `quiet` a line without a name at its end. Returns a figure.
 */
function lineChart(chart) {
  const box = make("div", { class: "plot" });
  const tip = make("div", { class: "tip", role: "status", hidden: true });
  const figure = make(
    "figure",
    {},
    make("figcaption", {}, make("h3", {}, chart.title), chart.note ? make("p", {}, chart.note) : null),
    box,
  );
  drawnAtWidth(box, (width) => {
    tip.hidden = true;
    box.replaceChildren(linesSvg(chart, width, tip), tip);
  });
  figure.append(valuesOf(chart));
  return figure;
}

function linesSvg(chart, width, tip) {
  const frame = frameOf(chart, width);
  const svg = canvas(
    frame,
    `${chart.title}, lines over ${chart.epochs ? "epochs" : "tasks"}: arrow keys read the values`,
  );
  drawAxes(svg, frame, chart);
  for (const one of chart.series) drawBand(svg, frame, one);
  for (const one of chart.series) drawLine(svg, frame, one);
  drawLabels(svg, frame, frame.labels);
  follow(svg, frame, chart, tip);
  return svg;
}

function canvas(frame, label) {
  const size = { width: frame.width, height: frame.height, viewBox: `0 0 ${frame.width} ${frame.height}` };
  return draw("svg", { ...size, role: "img", "aria-label": label, tabindex: "0" });
}

/** Where everything is: margins, scales, and whether names fit to the right of the lines. */
function frameOf(chart, width) {
  const height = 260,
    top = 10,
    bottom = 40;
  const axis = chart.axis(valuesWithBands(chart.series));
  const left = 14 + Math.max(...axis.ticks.map((tick) => textWidth(axis.label(tick))));
  const labelled = chart.series.length > 1 ? chart.series.filter((one) => !one.quiet) : [];
  const names = Math.max(...labelled.map((one) => textWidth(one.name)));
  const labels =
    labelled.length && names < 0.34 * width && labelled.length * 14 <= height - top - bottom ? labelled : [];
  const right = labels.length ? names + 22 : 14;
  const last = Math.max(...chart.series.map((one) => one.places[one.places.length - 1]));
  const first = Math.min(1, ...chart.series.map((one) => one.places[0]));
  const inner = width - left - right - 16;
  const x =
    last === first ? () => left + 8 + inner / 2 : (place) => left + 8 + (inner * (place - first)) / (last - first);
  const y = (value) => height - bottom - (height - top - bottom) * Math.min(1, axis.at(value));
  return { width, height, top, bottom, left, right, axis, labels, x, y, last, inner };
}

function valuesWithBands(series) {
  const ends = (one) =>
    one.mean.flatMap((mean, i) => (mean === null ? [] : [mean, mean + (one.std[i] ?? 0), mean - (one.std[i] ?? 0)]));
  return series.flatMap(ends);
}

function drawAxes(svg, frame, chart) {
  const { left, width, right, height, bottom, top } = frame;
  for (const tick of frame.axis.ticks) {
    const y = frame.y(tick);
    svg.append(draw("line", { x1: left, x2: width - right, y1: y, y2: y, class: "grid" }));
    svg.append(draw("text", { x: left - 6, y: y + 4, class: "tick", "text-anchor": "end" }, frame.axis.label(tick)));
  }
  for (const task of taskTicks(Math.ceil(frame.last), frame.inner)) {
    svg.append(
      draw("text", { x: frame.x(task), y: height - bottom + 17, class: "tick", "text-anchor": "middle" }, String(task)),
    );
  }
  const middle = (left + width - right) / 2;
  svg.append(draw("text", { x: middle, y: height - 5, class: "axis", "text-anchor": "middle" }, "tasks learned"));
  svg.append(draw("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "base" }));
}

/** Runs of neighbouring points that have a value; where points are epochs, those of one task. */
function pieces(one) {
  const found = [[]];
  one.mean.forEach((mean, i) => {
    if (mean === null || (one.epochs && Math.ceil(one.places[i]) !== Math.ceil(one.places[i - 1]))) found.push([]);
    if (mean !== null) found[found.length - 1].push(i);
  });
  return found.filter((piece) => piece.length);
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");

function drawBand(svg, frame, one) {
  for (const piece of pieces(one).filter((indices) => one.std[indices[0]] !== null)) {
    const edge = (sign) => piece.map((i) => [frame.x(one.places[i]), frame.y(one.mean[i] + sign * one.std[i])]);
    svg.append(
      draw("path", { d: `${path([...edge(1), ...edge(-1).reverse()])}Z`, fill: one.style.color, class: "band" }),
    );
  }
}

function drawLine(svg, frame, one) {
  const { color, dash } = one.style;
  const look = { stroke: color, "stroke-dasharray": dash, class: "line" };
  if (one.bound) {
    const y = frame.y(one.mean[0]);
    svg.append(draw("line", { ...look, x1: frame.left, x2: frame.width - frame.right, y1: y, y2: y }));
    svg.append(markerAt(one.style, frame.x(frame.last), y));
    return;
  }
  for (const piece of pieces(one)) {
    const points = piece.map((i) => [frame.x(one.places[i]), frame.y(one.mean[i])]);
    svg.append(draw("path", { ...look, d: path(points) }));
    const marked = one.style.marker && (one.places.length <= 25 || points.length === 1);
    if (marked) svg.append(...points.map(([x, y]) => markerAt(one.style, x, y, 0.8)));
  }
}

/** Names at the ends of the lines, each with a thin line that leads to it. */
function drawLabels(svg, frame, series) {
  const ends = series.map((one) => {
    const i = one.mean.findLastIndex((mean) => mean !== null);
    return [frame.x(one.bound ? frame.last : one.places[i]), frame.y(one.mean[i])];
  });
  const heights = apart(
    ends.map(([, y]) => y),
    14,
    frame.top + 4,
    frame.height - frame.bottom,
  );
  series.forEach((one, i) => {
    const x = frame.width - frame.right + 8;
    const [fromX, fromY] = ends[i];
    svg.append(
      draw("line", { x1: fromX + 6, y1: fromY, x2: x - 2, y2: heights[i], stroke: one.style.color, class: "lead" }),
    );
    svg.append(
      draw("text", { x, y: heights[i] + 4, fill: one.style.text ?? one.style.color, class: "label" }, one.name),
    );
  });
}

/** Shows the values at the place that is nearest to the pointer, or that the arrow keys reach. */
function follow(svg, frame, chart, tip) {
  const places = [...new Set(chart.series.flatMap((one) => (one.bound ? [] : one.places)))].sort((a, b) => a - b);
  if (!places.length) places.push(frame.last);
  const rule = draw("line", { y1: frame.top, y2: frame.height - frame.bottom, class: "rule", visibility: "hidden" });
  svg.append(rule);
  let at = places.length - 1;
  const hide = () => {
    tip.hidden = true;
    rule.setAttribute("visibility", "hidden");
  };
  const show = (index) => {
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = frame.x(places[at]);
    for (const end of ["x1", "x2"]) rule.setAttribute(end, x);
    rule.setAttribute("visibility", "visible");
    fillTip(tip, chart, places[at]);
    showTip(tip, x, frame.width);
  };
  const toPointer = (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    show(
      places.reduce(
        (best, place, i) => (Math.abs(frame.x(place) - x) < Math.abs(frame.x(places[best]) - x) ? i : best),
        0,
      ),
    );
  };
  const keys = {
    ArrowLeft: () => show(at - 1),
    ArrowRight: () => show(at + 1),
    Home: () => show(0),
    End: () => show(places.length - 1),
    Escape: hide,
  };
  svg.addEventListener("pointermove", toPointer);
  svg.addEventListener("pointerdown", toPointer);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", () => svg.matches(":focus-visible") && show(at));
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => keys[event.key] && (event.preventDefault(), keys[event.key]()));
}

function fillTip(tip, chart, place) {
  const rows = chart.series
    .map((one) => [one, one.bound ? 0 : one.places.indexOf(place)])
    .filter(([one, i]) => i >= 0 && one.mean[i] !== null)
    .sort(([a, i], [b, j]) => b.mean[j] - a.mean[i])
    .map(([one, i]) => make("li", {}, named(one.name, one.style), make("b", {}, valueText(chart, one, i))));
  const more = rows.splice(MOST_SHOWN).length;
  if (more) rows.push(make("li", {}, `and ${more} more below`));
  tip.replaceChildren(
    make("p", {}, placeText(chart, place)),
    make("ul", {}, rows.length ? rows : make("li", {}, "nothing measured")),
  );
}

const valueText = (chart, one, i) => `${one.rounded?.[i] ? "~" : ""}${spread(one.mean[i], one.std[i], chart.form)}`;

function placeText(chart, place) {
  if (!chart.epochs) return `after task ${place}`;
  return Number.isInteger(place)
    ? `end of task ${place}`
    : `in task ${Math.ceil(place)}, ${Math.round(100 * (place % 1))} % trained`;
}

/** The numbers of a chart as a table, for who would rather read or copy them. */
function valuesOf(chart) {
  const details = make("details", {}, make("summary", {}, "Values"));
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    const places = [...new Set(chart.series.flatMap((one) => one.places))].sort((a, b) => a - b);
    const title = chart.epochs ? "tasks" : "task";
    const columns = [
      { title, number: true, form: (place) => String(+place.toFixed(2)) },
      ...chart.series.map((one) => columnOf(chart, one)),
    ];
    details.append(
      sortable(
        columns,
        places.map((place) => [place, ...chart.series.map((one) => meanAt(one, place))]),
        chart.title,
      ),
    );
  });
  return details;
}

const meanAt = (one, place) => one.mean[one.places.indexOf(place)] ?? null;

function columnOf(chart, one) {
  const form = (value, row) => (value === null ? NONE : valueText(chart, one, one.places.indexOf(row[0])));
  return { title: one.name, number: true, form };
}
