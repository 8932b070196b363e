// The page's sections. Each is drawn from the numbers in the page; one without numbers disappears.

const page = JSON.parse(document.getElementById("data").textContent);
const groups = page.groups.map((group, index) => ({ ...group, style: styleOf(index) }));
const mostTasks = Math.max(...groups.map((group) => group.tasks));
/** Learns in one go what the others learn task by task: a bound, with no course of its own. */
const isBound = (group) => group.tasks === 1 && mostTasks > 1;
const arriving = groups.filter((group) => !isBound(group));
const fractions = (values) => linearAxis(values);
const percents = () => linearAxis([], { low: 0, high: 100 });
const fromZero = (values) => linearAxis(values, { low: 0 });

const NUMBERS = [
  ["acc", "ACC", fixed(2)],
  ["maa", "MAA", fixed(2)],
  ["bwt", "BWT", fixed(2)],
  ["forgetting", "forgetting", fixed(2)],
  ["plasticity", "plasticity", fixed(2)],
  ["acc_task_known", "task known", fixed(2)],
  ["task_recognition", "task recognised", fixed(2)],
  ["violation", "violation", scientific],
  ["danger", "danger", fixed(3)],
  ["seconds", "time", duration],
];
const WEIGHTED = [
  ["acc_sample_weighted", "ACC, weighted by images", fixed(2)],
  ["maa_sample_weighted", "MAA, weighted by images", fixed(2)],
];
const CURVES = {
  all: { title: "Accuracy on all tasks so far", note: "over all classes learned, %", form: fixed(1), axis: percents },
  newest: { title: "Accuracy on the newest task", note: "plasticity, %", form: fixed(1), axis: percents },
  known: {
    title: "Accuracy with the task known",
    note: "are a task's own classes still told apart? %",
    form: fixed(1),
    axis: percents,
  },
  recognised: {
    title: "Right task recognised",
    note: "share of images that fall to a class of their task, %",
    form: fixed(1),
    axis: percents,
  },
  violation: {
    title: "Violation",
    note: "share of the update that reaches protected inputs, mean over layers",
    form: scientific,
    axis: logAxis,
  },
  basis_rank: {
    title: "Protected directions",
    note: "rank of the protected subspace, mean over layers",
    form: fixed(1),
    axis: fromZero,
  },
  danger: {
    title: "Danger",
    note: "cosine of new features to the nearest old prototype",
    form: fixed(3),
    axis: fractions,
  },
};
const MATRICES = { all: "all classes learned", known: "task known", recognised: "task recognised" };
const MOST_NAMED = 12; // layers beside their lines
const TRAINING = {
  loss: { title: "Training loss", note: "mean over each epoch", form: fixed(3), axis: fromZero },
  accuracy: {
    title: "Training accuracy",
    note: "on the task being learned, over its own classes, %",
    form: fixed(1),
    axis: percents,
  },
};

function section(id, ...content) {
  const element = document.getElementById(id);
  const shown = content.flat().filter((one) => one !== null);
  element.hidden = !shown.length;
  element.querySelector(".content").append(...shown);
}

// tables -------------------------------------------------------------------------------------------------------------
/** The numbers that any group has; the weighted ones only where they say something else. */
function shownNumbers() {
  const differs = ([key]) =>
    groups.some(({ numbers }) => {
      const plain = numbers[key.slice(0, 3)],
        weighted = numbers[key];
      return weighted && (!plain || Math.abs(weighted.mean - plain.mean) > 0.005);
    });
  const measured = ([key]) => groups.some(({ numbers }) => numbers[key]?.values.some((value) => value !== null));
  return [...NUMBERS, ...WEIGHTED.filter(differs)].filter(measured);
}

function summaryTable() {
  const columns = [
    { title: "group", form: (name, row) => named(name, row.style) },
    { title: "seeds", number: true },
    ...shownNumbers().map(([key, title, form]) => ({
      title,
      number: true,
      form: (value, { numbers }) => meanText(numbers[key], form),
    })),
  ];
  const rows = groups.map((group) => {
    const means = shownNumbers().map(([key]) => group.numbers[key]?.mean ?? null);
    return Object.assign([group.name, group.seeds.length, ...means], { style: group.style, numbers: group.numbers });
  });
  return sortable(columns, rows, "Mean ± standard deviation over seeds");
}

/** What other classifiers make of the same features; nothing where no run has measured more than its own. */
function headsTable() {
  const heads = [...new Set(groups.flatMap((group) => Object.keys(group.heads)))];
  if (!groups.some((group) => Object.keys(group.heads).length > 1)) return null;
  const columns = [
    { title: "group", form: (name, row) => named(name, row.style) },
    ...heads.map((head) => ({
      title: head,
      number: true,
      form: (value, { accuracies }) => meanText(accuracies[head]?.acc, fixed(2)),
    })),
  ];
  const rows = groups.map((group) => {
    const means = heads.map((head) => group.heads[head]?.acc.mean ?? null);
    return Object.assign([group.name, ...means], { style: group.style, accuracies: group.heads });
  });
  return sortable(columns, rows, "ACC by head, fitted to the features of the same runs");
}

function meanText(of, form) {
  if (!of || of.mean === null) return NONE;
  const std = of.std === null ? null : make("span", { class: "std" }, ` ± ${form(of.std)}`);
  return make("span", {}, (of.rounded?.every(Boolean) ? "~" : "") + form(of.mean), std);
}

function runsTable() {
  const marked =
    (key, form) =>
    (value, { run, numbers }) =>
      (value !== null && numbers[key].rounded?.[run] ? "~" : "") + form(value);
  const columns = [
    { title: "folder" },
    { title: "group", form: (name, row) => named(name, row.style) },
    { title: "seed", number: true },
    ...shownNumbers().map(([key, title, form]) => ({ title, number: true, form: marked(key, form) })),
  ];
  const rows = groups.flatMap((group) =>
    group.folders.map((folder, run) => {
      const values = shownNumbers().map(([key]) => group.numbers[key]?.values[run] ?? null);
      return Object.assign([folder, group.name, group.seeds[run], ...values], {
        style: group.style,
        numbers: group.numbers,
        run,
      });
    }),
  );
  return sortable(columns, rows, "The numbers of every run");
}

function settingsTable() {
  if (!page.differences.length) return null;
  const columns = [{ title: "setting" }, ...groups.map((group) => ({ title: named(group.name, group.style) }))];
  const rows = page.differences.map(({ name, values }) => [
    name,
    ...values.map((value) => (value === NONE ? null : value)),
  ]);
  return sortable(columns, rows, "Settings in which the runs differ");
}

// charts -------------------------------------------------------------------------------------------------------------
const tasksOf = (curve) => curve.mean.map((_, t) => t + 1);

function seriesOf(group, curve) {
  return { name: group.name, style: group.style, places: tasksOf(curve), bound: isBound(group), ...curve };
}

function curveCharts() {
  const bounds = groups.filter(isBound).map((group) => group.name);
  document.querySelector("#curves > .single").textContent = bounds.length
    ? `${bounds.join(" and ")}: all classes at once, a line across the first chart and in no other.`
    : "";
  return Object.entries(CURVES).map(([key, chart]) => {
    const shown = (key === "all" ? groups : arriving).filter((group) => group.curves[key]);
    return shown.length
      ? lineChart({ ...chart, series: shown.map((group) => seriesOf(group, group.curves[key])) })
      : null;
  });
}

function trainingCharts() {
  const trained = arriving.filter((group) => group.training.places);
  const charts = Object.entries(TRAINING).map(([key, chart]) => {
    const series = trained.map((group) => ({
      name: group.name,
      style: group.style,
      places: group.training.places,
      epochs: true,
      ...group.training[key],
    }));
    return series.length ? lineChart({ ...chart, epochs: true, series }) : null;
  });
  const timed = arriving.filter((group) => group.curves.seconds);
  const series = timed.map((group) => seriesOf(group, group.curves.seconds));
  const time = {
    title: "Time for each task",
    note: "training, without evaluation",
    form: duration,
    axis: timeAxis,
    series,
  };
  return [...charts, timed.length ? lineChart(time) : null];
}

/** In seconds, minutes or hours, as suits the longest. */
function timeAxis(values) {
  const [unit, seconds] = [
    ["h", 3600],
    ["min", 60],
    ["s", 1],
  ].find(([, size]) => Math.max(...values) >= 2 * size) ?? ["s", 1];
  const axis = linearAxis(
    values.map((value) => value / seconds),
    { low: 0 },
  );
  return {
    ticks: axis.ticks.map((tick) => tick * seconds),
    label: (tick) => `${axis.label(tick / seconds)} ${unit}`,
    at: (value) => axis.at(value / seconds),
  };
}

function balanceChart() {
  const points = groups.filter(
    ({ numbers }) => typeof numbers.bwt?.mean === "number" && typeof numbers.plasticity?.mean === "number",
  );
  if (!points.length) return [];
  const tasks = new Set(points.map((group) => group.tasks));
  const left = groups.filter((group) => !points.includes(group)).map((group) => group.name);
  const note = left.length
    ? make("p", { class: "note" }, `Not here, for want of a second task: ${left.join(", ")}.`)
    : null;
  const data = points.map((group) => ({
    name: group.name,
    style: group.style,
    x: group.numbers.plasticity,
    y: group.numbers.bwt,
  }));
  const faint = tasks.size === 1 ? make("p", { class: "note" }, "The falling lines join what has the same ACC.") : null;
  return [legendOf(points), scatterChart(data, tasks.size === 1 ? points[0].tasks : null), faint, note];
}

const legendOf = (shown) => (shown.length > 1 ? legend(shown) : null);

function layerCharts() {
  const kinds = [
    ["violation_per_layer", "violation", scientific, logAxis],
    ["basis_rank", "protected directions", fixed(0), fromZero],
  ];
  return groups.flatMap((group) =>
    kinds.map(([key, what, form, axis]) => {
      const layers = group.layers[key] ?? [];
      if (!layers.length) return null;
      const series = layers.map((layer, i) => layerSeries(layer, i, layers.length));
      if (key === "violation_per_layer" && group.curves.rounding) series.push(roundingOf(group));
      return lineChart({ title: `${group.name}: ${what}`, form, axis, series });
    }),
  );
}

/** What the rounding of the weights can make, beside the violations. */
function roundingOf(group) {
  const style = { color: "var(--muted)", dash: "2 3", marker: null };
  return {
    name: "rounding",
    style,
    places: tasksOf(group.curves.rounding),
    ...group.curves.rounding,
    std: group.curves.rounding.mean.map(() => null),
  };
}

/** One of `count` layers; of many not all are named beside their lines. */
function layerSeries(layer, index, count) {
  const share = count > 1 ? Math.round((100 * index) / (count - 1)) : 100;
  const color = `color-mix(in oklab, var(--deep) ${share}%, var(--shallow))`;
  const quiet = index % Math.ceil(count / MOST_NAMED) !== 0;
  const style = { color, dash: "", marker: null, text: "var(--ink)" };
  return { ...layer, name: layer.short, style, quiet, places: tasksOf(layer), std: layer.mean.map(() => null) };
}

// accuracy matrices --------------------------------------------------------------------------------------------------
function matrixViews() {
  const kinds = Object.keys(MATRICES).filter((kind) => groups.some((group) => group.matrices[kind]));
  const shown = groups.filter((group) => group.tasks > 1);
  if (!shown.length) return [];
  const grid = make("div", { class: "grid narrow" });
  const show = (kind) =>
    grid.replaceChildren(
      ...shown
        .filter((group) => group.matrices[kind])
        .map((group) => {
          const caption = `${group.name}: accuracy by task, ${MATRICES[kind]}`;
          return make(
            "figure",
            {},
            make("figcaption", {}, make("h3", {}, named(group.name, group.style))),
            matrixTable(group.matrices[kind], caption),
          );
        }),
    );
  show(kinds[0]);
  return [make("div", { class: "bar" }, choice(kinds, show), colorBar()), grid];
}

function choice(kinds, show) {
  const options = kinds.map((kind, i) => {
    const radio = make("input", { type: "radio", name: "matrix", value: kind, checked: i === 0 });
    radio.addEventListener("change", () => show(kind));
    return make("label", {}, radio, make("span", {}, MATRICES[kind]));
  });
  return make("fieldset", { class: "choice" }, make("legend", {}, "Accuracy over"), options);
}

const colorBar = () => make("p", { class: "colors" }, "0 %", make("span", { "aria-hidden": "true" }), "100 %");

// the page -----------------------------------------------------------------------------------------------------------
function about() {
  const runs = groups.reduce((sum, group) => sum + group.seeds.length, 0);
  const several = groups.some((group) => group.seeds.length > 1);
  const seeds = several
    ? " Runs that differ only in their seed are one group: lines are means, bands one standard deviation."
    : "";
  const tasks = [...new Set(groups.map((group) => group.tasks))].sort((a, b) => a - b);
  const many = `${count(runs, "run", "runs")} in ${count(groups.length, "group", "groups")}`;
  const each = `${tasks.join(" or ")} ${mostTasks === 1 ? "task" : "tasks"}`;
  document.getElementById("about").textContent = `${many}, ${each}, measured on ${page.measured}.${seeds}`;
  const skipped = document.getElementById("skipped");
  skipped.hidden = !page.skipped.length;
  skipped.append(...page.skipped.map((line) => make("li", {}, line)));
}

function contents() {
  const shown = [...document.querySelectorAll("main > section:not([hidden])")];
  const links = shown.map((one) => make("a", { href: `#${one.id}` }, one.querySelector("h2").textContent));
  document.getElementById("contents").append(...links);
}

const gridOf = (shown, figures) =>
  figures.some(Boolean) ? [legendOf(shown), make("div", { class: "grid" }, figures)] : [];

about();
section("summary", summaryTable(), headsTable());
section("curves", gridOf(groups, curveCharts()));
section("balance", balanceChart());
section("matrices", matrixViews());
section("layers", gridOf([], layerCharts()));
section("training", gridOf(arriving, trainingCharts()));
section("settings", settingsTable());
section("runs", runsTable());
contents();
