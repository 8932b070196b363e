// Tables that sort by a click on a heading, and accuracy matrices as coloured tables.

const DENSE = 30; // tasks from which cells have a colour and no number

/**
 * `columns`: {title, form: (value, row) -> text or element, number: true where values are numbers}; a row is a list of
 * values, null where there is none. The first column heads the row.
 */
function sortable(columns, rows, caption) {
  const body = make(
    "tbody",
    {},
    rows.map((row) => tableRow(columns, row)),
  );
  const places = new Map(rows.map((row, i) => [row, body.rows[i]]));
  const heads = columns.map((column, at) => heading(column, () => sortBy(at)));
  function sortBy(at) {
    const up =
      heads[at].getAttribute("aria-sort") === "ascending" ||
      (!heads[at].hasAttribute("aria-sort") && columns[at].number);
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[at].setAttribute("aria-sort", up ? "descending" : "ascending");
    const sorted = [...rows].sort((a, b) => compare(a[at], b[at], up ? -1 : 1));
    body.append(...sorted.map((row) => places.get(row)));
  }
  const table = make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, heads)), body);
  return scrolling(table, caption);
}

function heading(column, sort) {
  const button = make("button", { type: "button" }, column.title);
  button.addEventListener("click", sort);
  return make("th", { scope: "col", class: column.number ? "number" : null }, button);
}

function tableRow(columns, row) {
  const cells = columns.map((column, at) => {
    const shown = column.form ? column.form(row[at], row) : (row[at] ?? NONE);
    return at
      ? make("td", { class: column.number ? "number" : null }, shown)
      : make("th", { scope: "row" }, make("div", {}, shown));
  });
  return make("tr", {}, cells);
}

/** What is missing comes last, however one sorts. */
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
}

/** A box in which something wide scrolls; the keyboard reaches it. */
function scrolling(content, label) {
  return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, content);
}

// accuracy matrices --------------------------------------------------------------------------------------------------
function matrixTable(rows, caption) {
  const dense = rows.length > DENSE;
  const tasks = rows.map((_, i) => i + 1);
  const number = (task) => (dense && task % 10 ? "" : String(task));
  const corner = make("td", { class: "corner" }, "↓ after");
  const head = make(
    "tr",
    {},
    corner,
    tasks.map((task) => make("th", { scope: "col" }, number(task))),
  );
  const body = rows.map((row, t) =>
    make("tr", {}, make("th", { scope: "row" }, number(t + 1)), cellsOf(row, t, dense)),
  );
  const table = make("table", { class: dense ? "matrix dense" : "matrix" }, make("caption", {}, caption));
  table.append(make("thead", {}, head), make("tbody", {}, body));
  return scrolling(table, caption);
}

/** Which text can be read on the colour of a cell; the styles of light and dark differ in the middle. */
const shade = (value) => (value > 68 ? "high" : value > 54 ? "middle" : "low");

function cellsOf(row, t, dense) {
  return row.mean.map((value, j) => {
    const runs = row.values.length > 1 ? ` (${row.values.map((run) => fixed(1)(run[j])).join(", ")})` : "";
    const title = `after task ${t + 1}, on task ${j + 1}: ${spread(value, row.std[j], fixed(1))} %${runs}`;
    const cell = make("td", { title, class: shade(value) }, dense ? "" : value === 100 ? "100" : fixed(1)(value));
    cell.style.setProperty("--share", `${value}%`);
    return cell;
  });
}
