// Charts of lines over steps. They are SVG whose colours are the page's, so a theme reaches them.

import { h, s } from "./dom.js";

export const COLORS = [1, 2, 3, 4, 5, 6].map((i) => `var(--line-${i})`);
// Besides a colour, what tells a line: for who cannot tell colours apart.
export const DASHES = ["", "6 4"];
// Points of a marked line that are still shown as such.
const FEW = 60;
// Pixels above the plot, below it, and at its right.
const [ABOVE, BELOW, RIGHT] = [8, 20, 14];

// A curve; of a long one its means, and behind them from where to where it goes.
export function linesOf(name, curve, color, dash) {
  const mean = { name, points: curve.points, color, dash };
  const range = { name, points: curve.extremes, color, pale: true };
  return range.points.length ? [mean, range] : [mean];
}

// The round numbers from low to high, about n of them, and the step between two.
function ticks(low, high, n, least = 0) {
  const rough = Math.max((high - low) / n, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= 0.999 * rough);
  const first = Math.ceil(low / step - 1e-9);
  const length = Math.floor(high / step + 1e-9) - first + 1;
  return [Array.from({ length }, (_, i) => +((first + i) * step).toPrecision(12)), step];
}

const inWords = (value, digits = 6) =>
  value.toLocaleString("en-US", { maximumSignificantDigits: digits });

const nearest = (points, x) =>
  points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));

// A chart with `draw(lines, { end, legend })`. A line has a name, points, a colour, maybe a dash;
// `marked` shows its points, if they are few, `pale` is behind the others. The label is for who
// cannot see it.
export function chart(label, { unit = "", tall = false } = {}) {
  const plot = h("div.plot");
  const legend = h("div.legend");
  const tip = h("div.tip", { hidden: true });
  const props = { role: "img", "aria-label": label };
  const element = h(`div.chart.${tall ? "tall" : ""}`, props, legend, plot, tip);
  const cross = s("line", { class: "cross" });
  let [end, scale] = [null, null];
  element.lines = [];

  element.draw = (lines, how = {}) => {
    [element.lines, end] = [lines, how.end ?? 0];
    const named = how.legend ? lines.filter((line) => !line.pale) : [];
    legend.replaceChildren(...named.map((line) => h("span", swatch(line), line.name)));
    redraw();
  };

  function redraw() {
    const { clientWidth: width, clientHeight: height } = plot;
    const lines = element.lines.filter((line) => line.points.length);
    if (!lines.length || !width) return plot.replaceChildren();
    const points = lines.flatMap((line) => line.points);
    const ys = points.map(([, y]) => y);
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    const room = low === high ? Math.abs(low || 1) / 10 : 0;
    [low, high] = [low - room, high + room];
    const [, step] = ticks(low, high, 4);
    [low, high] = [Math.floor(low / step) * step, Math.ceil(high / step) * step];
    const [rows] = ticks(low, high, (high - low) / step);
    const most = Math.max(end, 1, ...points.map(([x]) => x));
    const left = 10 + 6.5 * Math.max(...rows.map((y) => inWords(y).length));
    const [right, bottom] = [width - RIGHT, height - BELOW];
    scale = {
      x: (x) => left + (x / most) * (right - left),
      y: (y) => bottom - ((y - low) / (high - low)) * (bottom - ABOVE),
      step: (pixel) => ((pixel - left) / (right - left)) * most,
    };
    const text = (x, y, anchor, value) =>
      s("text", { x, y, "text-anchor": anchor }, inWords(value));
    const [columns] = ticks(0, most, Math.max(1, (right - left) / 80), 1);
    for (const [name, y] of [["y1", ABOVE], ["y2", bottom]]) cross.setAttribute(name, y);
    plot.replaceChildren(s("svg", { width, height },
      ...rows.map(scale.y).map((y) => s("line", { x1: left, x2: right, y1: y, y2: y })),
      ...rows.map((y) => text(left - 6, scale.y(y) + 4, "end", y)),
      ...columns.map((x) => text(scale.x(x), height - 4, "middle", x)),
      ...lines.toSorted((a, b) => !!b.pale - !!a.pale).flatMap(drawn),
      cross));
  }

  function drawn({ points, color, dash = "", pale, marked }) {
    const places = points.map(([x, y]) => [scale.x(x).toFixed(1), scale.y(y).toFixed(1)]);
    const path = s("path", { d: `M${places.join("L")}`, "stroke-dasharray": dash });
    path.classList.toggle("pale", !!pale);
    path.style.stroke = color;
    const few = points.length <= (marked ? FEW : 1);
    const circles = places.map(([cx, cy]) => s("circle", { cx, cy, r: 3 }));
    circles.forEach((circle) => (circle.style.fill = color));
    return [path, ...(few ? circles : [])];
  }

  // The values at the step that is pointed at.
  function point(event) {
    const lines = element.lines.filter((line) => line.points.length && !line.pale);
    if (!lines.length) return;
    const box = plot.getBoundingClientRect();
    const wanted = scale.step(event.clientX - box.left);
    const [at] = nearest(lines.map((line) => nearest(line.points, wanted)), wanted);
    tip.replaceChildren(h("div.muted", `step ${inWords(Math.round(at))}`), ...lines.map((line) => {
      const [x, y] = nearest(line.points, at);
      const where = x === at ? "" : ` (step ${inWords(Math.round(x))})`;
      return h("div", swatch(line), `${line.name}${where}: `, h("b", inWords(y, 5) + unit));
    }));
    tip.hidden = false;
    const x = scale.x(at);
    tip.style.left = `${Math.max(0, Math.min(x + 12, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${plot.offsetTop + ABOVE}px`;
    for (const name of ["x1", "x2"]) cross.setAttribute(name, x);
    cross.classList.add("on");
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cross.classList.remove("on");
  });
  new ResizeObserver(redraw).observe(plot);
  return element;
}

// A piece of a line, for where it is named.
export function swatch({ color, dash = "" }) {
  const path = s("path", { d: "M0 5h22", "stroke-dasharray": dash });
  path.style.stroke = color;
  return s("svg", { class: "swatch", width: 22, height: 10, "aria-hidden": true }, path);
}
