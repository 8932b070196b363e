"use strict";
// Elements, number formats, and how a group of runs is told from the others.

const SVG = "http://www.w3.org/2000/svg";
const NONE = "–";
const COLORS = 8;
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const MARKERS = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z", // circle
  "M-3.6,-3.6h7.2v7.2h-7.2Z", // square
  "M0,-4.8L4.6,3.4H-4.6Z", // triangle
  "M0,-5L5,0L0,5L-5,0Z", // diamond
  "M0,4.8L4.6,-3.4H-4.6Z", // triangle upside down
  "M-4.4,-2.2L-2.2,-4.4L0,-2.2L2.2,-4.4L4.4,-2.2L2.2,0L4.4,2.2L2.2,4.4L0,2.2L-2.2,4.4L-4.4,2.2L-2.2,0Z", // cross
];
const DIGITS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** An element with attributes (null: none; true: without value) and children; text stays text. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

// numbers ------------------------------------------------------------------------------------------------------------
const orNone = (form) => (value) => (value === null || value === undefined ? NONE : form(value));
const minus = (text) => text.replace(/^-/, "−");
const fixed = (digits) => orNone((value) => minus(value.toFixed(digits)));
const whole = fixed(0);

/** 3.4e-8 as 3.4·10⁻⁸; numbers from 0.01 to 1000 as they are. */
const scientific = orNone((value) => {
  if (value === 0 || (Math.abs(value) >= 0.01 && Math.abs(value) < 1000)) return minus(String(+value.toPrecision(2)));
  const [mantissa, power] = value.toExponential(1).split("e");
  return `${minus(mantissa)}·10${superscript(+power)}`;
});

const superscript = (power) => [...String(power)].map((digit) => DIGITS[digit]).join("");

/** Seconds in the largest two units. */
const duration = orNone((seconds) => {
  if (seconds < 59.95) return `${seconds.toFixed(1)}\u00a0s`;
  const minutes = Math.round(seconds / 60);
  if (seconds < 3600) return `${Math.floor(Math.round(seconds) / 60)}\u00a0min ${Math.round(seconds) % 60}\u00a0s`;
  return `${Math.floor(minutes / 60)}\u00a0h ${minutes % 60}\u00a0min`;
});

/** "44.4 ± 1.0"; without a deviation the mean alone. */
function spread(mean, std, form) {
  return std === null || std === undefined || mean === null ? form(mean) : `${form(mean)} ± ${form(std)}`;
}

const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;

/** Shows a box of values beside the place `x` of a picture, within the picture's `width`. */
function showTip(tip, x, width) {
  tip.hidden = false;
  const right = x + 12;
  const left = right + tip.offsetWidth > width ? x - 12 - tip.offsetWidth : right;
  tip.style.left = `${Math.max(0, Math.min(left, width - tip.offsetWidth))}px`;
}

// groups -------------------------------------------------------------------------------------------------------------
/** Colour, dashes and marker of group `index`; the first 24 differ in colour or marker, neighbours in all three. */
function styleOf(index) {
  const round = Math.floor(index / COLORS);
  return {
    color: `var(--series-${index % COLORS})`,
    dash: DASHES[(index + round) % DASHES.length],
    marker: MARKERS[(index + round) % MARKERS.length],
  };
}

function markerAt(style, x, y, size = 1) {
  const place = `translate(${x.toFixed(1)},${y.toFixed(1)}) scale(${size})`;
  return draw("path", { d: style.marker, transform: place, fill: style.color, class: "marker" });
}

/** A short piece of the group's line, to stand before its name. */
function swatch(style) {
  const line = { x1: 0, x2: 28, y1: 7, y2: 7, stroke: style.color, "stroke-width": 2, "stroke-dasharray": style.dash };
  const size = { width: 28, height: 14, viewBox: "0 0 28 14", "aria-hidden": "true", class: "swatch" };
  return draw("svg", size, draw("line", line), style.marker ? markerAt(style, 14, 7) : null);
}

function named(name, style) {
  return make("span", { class: "named" }, swatch(style), make("span", {}, name));
}

function legend(series) {
  return make(
    "ul",
    { class: "legend" },
    series.map((one) => make("li", {}, named(one.name, one.style))),
  );
}
