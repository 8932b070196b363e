// Stability against plasticity: a point a group, its runs around it, and lines of equal accuracy.

/** `points`: {name, style, x: spread, y: spread}; `tasks`: the number of tasks where all groups share it, else null. */
function scatterChart(points, tasks) {
  const box = make("div", { class: "plot" });
  const tip = make("div", { class: "tip", role: "status", hidden: true });
  drawnAtWidth(box, (width) => box.replaceChildren(scatterSvg(points, tasks, width, tip), tip));
  return make("figure", { class: "wide" }, box);
}

function scatterSvg(points, tasks, width, tip) {
  const frame = scatterFrame(points, width);
  const svg = draw("svg", { width, height: frame.height, viewBox: `0 0 ${width} ${frame.height}`, role: "group" });
  svg.setAttribute("aria-label", "stability against plasticity, a point for each group");
  drawGrid(svg, frame);
  if (tasks) drawEqualAccuracy(svg, frame, tasks);
  for (const point of points) drawWhiskers(svg, frame, point);
  const taken = points.map((point) => boxAround(frame.x(point.x.mean), frame.y(point.y.mean), 7, 7));
  for (const point of points) {
    drawName(svg, frame, point, taken);
    svg.append(pointMark(frame, point, tip));
  }
  return svg;
}

function scatterFrame(points, width) {
  const all = (key) =>
    points.flatMap(({ [key]: of }) => [...of.values, of.mean - (of.std ?? 0), of.mean + (of.std ?? 0)]);
  const [across, up] = [linearAxis(padded(all("x"))), linearAxis(padded(all("y")))];
  const height = Math.max(320, Math.min(460, 0.55 * width)),
    top = 12,
    bottom = 46,
    right = 16;
  const left = 32 + Math.max(...up.ticks.map((tick) => textWidth(up.label(tick))));
  const x = (value) => left + (width - left - right) * across.at(value);
  const y = (value) => height - bottom - (height - top - bottom) * up.at(value);
  return { width, height, top, bottom, left, right, across, up, x, y };
}

function padded(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = 0.06 * (high - low) || 1;
  return [low - room, high + room];
}

function drawGrid(svg, frame) {
  const { left, right, top, bottom, width, height } = frame;
  for (const tick of frame.across.ticks) {
    svg.append(draw("line", { x1: frame.x(tick), x2: frame.x(tick), y1: top, y2: height - bottom, class: "grid" }));
    svg.append(
      draw(
        "text",
        { x: frame.x(tick), y: height - bottom + 17, class: "tick", "text-anchor": "middle" },
        frame.across.label(tick),
      ),
    );
  }
  for (const tick of frame.up.ticks) {
    svg.append(
      draw("line", {
        x1: left,
        x2: width - right,
        y1: frame.y(tick),
        y2: frame.y(tick),
        class: tick === 0 ? "base" : "grid",
      }),
    );
    svg.append(
      draw("text", { x: left - 6, y: frame.y(tick) + 4, class: "tick", "text-anchor": "end" }, frame.up.label(tick)),
    );
  }
  const [middle, centre] = [(left + width - right) / 2, (top + height - bottom) / 2];
  const turned = `translate(15,${centre}) rotate(-90)`;
  svg.append(
    draw(
      "text",
      { x: middle, y: height - 6, class: "axis", "text-anchor": "middle" },
      "plasticity: accuracy of new tasks (%), better →",
    ),
  );
  svg.append(
    draw("text", { transform: turned, class: "axis", "text-anchor": "middle" }, "stability: BWT (points), better →"),
  );
}

/** ACC = plasticity + BWT (T - 1) / T, so groups of equal ACC lie on one falling line. */
function drawEqualAccuracy(svg, frame, tasks) {
  const share = (tasks - 1) / tasks;
  const ends = (ticks) => [ticks[0], ticks[ticks.length - 1]];
  const [[x0, x1], [y0, y1]] = [ends(frame.across.ticks), ends(frame.up.ticks)];
  for (const acc of linearTicks(x0 + share * y0, x1 + share * y1, 7)) {
    const from = Math.max(x0, acc - share * y1),
      to = Math.min(x1, acc - share * y0);
    if (to - from < 0.12 * (x1 - x0)) continue;
    const at = (x) => [frame.x(x), frame.y((acc - x) / share)];
    const [[fromX, fromY], [toX, toY]] = [at(from), at(to)];
    svg.append(draw("line", { x1: fromX, y1: fromY, x2: toX, y2: toY, class: "equal" }));
    const below = toX + 56 < frame.width - frame.right;
    if (!below && fromX - 56 < frame.left) continue;
    const place = below ? { x: toX + 4, y: toY - 6 } : { x: fromX - 4, y: fromY + 15, "text-anchor": "end" };
    svg.append(draw("text", { ...place, class: "tick" }, `ACC ${+acc.toFixed(2)}`));
  }
}

function drawWhiskers(svg, frame, { x, y, style }) {
  const look = { stroke: style.color, class: "whisker" };
  const [cx, cy] = [frame.x(x.mean), frame.y(y.mean)];
  if (x.std !== null)
    svg.append(draw("line", { ...look, x1: frame.x(x.mean - x.std), x2: frame.x(x.mean + x.std), y1: cy, y2: cy }));
  if (y.std !== null)
    svg.append(draw("line", { ...look, x1: cx, x2: cx, y1: frame.y(y.mean - y.std), y2: frame.y(y.mean + y.std) }));
  if (x.values.length < 2) return;
  const dots = x.values.map((value, i) =>
    draw("circle", { cx: frame.x(value), cy: frame.y(y.values[i]), r: 2.2, fill: style.color, class: "run" }),
  );
  svg.append(...dots);
}

function pointMark(frame, point, tip) {
  const [x, y] = [frame.x(point.x.mean), frame.y(point.y.mean)];
  const [plasticity, transfer] = [point.x, point.y].map((of) => spread(of.mean, of.std, fixed(2)));
  const text = `plasticity ${plasticity}, BWT ${transfer}`;
  const target = draw("circle", { cx: x, cy: y, r: 12, class: "target" });
  const mark = draw(
    "g",
    { tabindex: "0", role: "img", "aria-label": `${point.name}: ${text}`, class: "point" },
    target,
    markerAt(point.style, x, y, 1.5),
  );
  const show = () => {
    tip.replaceChildren(make("p", {}, named(point.name, point.style)), make("p", {}, text));
    tip.style.top = `${Math.min(y + 8, frame.height - 80)}px`;
    showTip(tip, x, frame.width);
  };
  for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => (tip.hidden = true));
  return mark;
}

// names --------------------------------------------------------------------------------------------------------------
const boxAround = (x, y, halfWidth, halfHeight) => [x - halfWidth, y - halfHeight, x + halfWidth, y + halfHeight];
const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

/** Beside the point where nothing else stands; nowhere if there is no such place. */
function drawName(svg, frame, point, taken) {
  const [x, y] = [frame.x(point.x.mean), frame.y(point.y.mean)];
  const half = textWidth(point.name) / 2 + 2;
  const centres = [
    [x + half + 9, y - 9],
    [x - half - 9, y - 9],
    [x + half + 9, y + 11],
    [x - half - 9, y + 11],
    [x, y - 17],
    [x, y + 18],
  ];
  const inside = ([left, top, right, bottom]) =>
    left >= frame.left && right <= frame.width - frame.right && top >= 0 && bottom <= frame.height - frame.bottom;
  const free = centres.find((centre) => {
    const box = boxAround(...centre, half, 8);
    return inside(box) && !taken.some((other) => overlap(box, other));
  });
  if (!free) return;
  taken.push(boxAround(...free, half, 8));
  svg.append(
    draw(
      "text",
      { x: free[0], y: free[1] + 4, fill: point.style.color, class: "label", "text-anchor": "middle" },
      point.name,
    ),
  );
}
