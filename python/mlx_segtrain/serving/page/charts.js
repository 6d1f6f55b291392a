// Charts of lines over steps. They are SVG whose colours are the page's, so a theme reaches them.

import { h, s } from "./dom.js";

export const COLORS = [1, 2, 3, 4, 5, 6].map((i) => `var(--line-${i})`);
// Besides a colour, what tells a line: for who cannot tell colours apart.
export const DASHES = ["", "6 4", "2 3"];
// Points of a marked line that are still shown as such.
const FEW = 60;

// A curve; of a long one its means, and behind them from where to where it goes.
export function linesOf(name, curve, color, dash) {
  const shown = [{ name, points: curve.points, color, dash }];
  const points = curve.extremes;
  return points.length ? [...shown, { name: `${name}, range`, points, color, pale: true }] : shown;
}

// About n round numbers from low to high; with a least step.
function ticks(low, high, n, least = 0) {
  const rough = Math.max((high - low) / n, least, 1e-12);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const many = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: many }, (_, i) => +((first + i) * step).toPrecision(12));
}

const short = (value) => +value.toPrecision(5);
const label = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 6 });

const nearest = (points, x) =>
  points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));

// A chart with `draw(lines, { end, legend })`: lines have name, points, color, and may have a dash,
// be `marked` (few points are shown) or `pale` (behind the others). The label is for who cannot see
// it.
export function chart(name, { unit = "", tall = false } = {}) {
  const plot = h("div.plot");
  const legend = h("div.legend");
  const tip = h("div.tip", { hidden: true });
  const element = h(`div.chart.${tall ? "tall" : ""}`, { role: "img", "aria-label": name }, legend, plot, tip);
  let [end, scale, cross] = [null, null, null];
  element.lines = [];

  element.draw = (lines, how = {}) => {
    [element.lines, end] = [lines, how.end];
    const named = how.legend ? lines.filter((line) => !line.pale) : [];
    legend.replaceChildren(...named.map((line) => h("span", swatch(line), line.name)));
    redraw();
  };

  function redraw() {
    const lines = element.lines.filter((line) => line.points.length);
    const { clientWidth: width, clientHeight: height } = plot;
    if (!lines.length || !width) return plot.replaceChildren();
    const all = lines.flatMap((line) => line.points);
    const ys = all.map(([, y]) => y);
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
    const marks = ticks(low, high, 4);
    const step = marks.length > 1 ? marks[1] - marks[0] : high - low;
    [low, high] = [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
    const right = Math.max(end ?? 0, ...all.map(([x]) => x), 1);
    const rows = ticks(low, high, 5);
    const left = 10 + 6.5 * Math.max(...rows.map((y) => label(y).length));
    const [w, bottom] = [width - left - 14, height - 20];
    scale = {
      x: (x) => left + (x / right) * w,
      y: (y) => 8 + (1 - (y - low) / (high - low)) * (bottom - 8),
      step: (px) => ((px - left) / w) * right,
    };
    const text = (x, y, anchor, value) => s("text", { x, y, "text-anchor": anchor }, label(value));
    const rule = (y) => s("line", { x1: left, x2: left + w, y1: y, y2: y });
    cross = s("line", { class: "cross", y1: 8, y2: bottom });
    plot.replaceChildren(
      s(
        "svg",
        { width, height },
        ...rows.flatMap((y) => [rule(scale.y(y)), text(left - 6, scale.y(y) + 4, "end", y)]),
        ...ticks(0, right, Math.max(1, w / 80), 1).map((x) => text(scale.x(x), height - 4, "middle", x)),
        ...lines.toSorted((a, b) => !!b.pale - !!a.pale).flatMap(drawn),
        cross,
      ),
    );
  }

  function drawn({ points, color, dash, pale, marked }) {
    const d = points.map(([x, y], i) => `${i ? "L" : "M"}${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`);
    const path = s("path", { d: d.join(""), class: pale ? "pale" : "", "stroke-dasharray": dash ?? "" });
    path.style.stroke = color;
    const shown = points.length <= (marked ? FEW : 1) ? points : [];
    const circles = shown.map(([x, y]) => s("circle", { cx: scale.x(x), cy: scale.y(y), r: 3 }));
    circles.forEach((circle) => (circle.style.fill = color));
    return [path, ...circles];
  }

  // The values at the step that is pointed at.
  function point(event) {
    const lines = element.lines.filter((line) => line.points.length && !line.pale);
    if (!lines.length) return;
    const box = plot.getBoundingClientRect();
    const wanted = scale.step(event.clientX - box.left);
    const [at] = nearest(lines.map((line) => nearest(line.points, wanted)), wanted);
    const told = lines.map((line) => {
      const [x, y] = nearest(line.points, at);
      const where = x === at ? "" : ` (step ${label(Math.round(x))})`;
      return h("div", swatch(line), `${line.name}${where}: `, h("b", `${short(y)}${unit}`));
    });
    tip.replaceChildren(h("div.muted", `step ${label(Math.round(at))}`), ...told);
    tip.hidden = false;
    const x = scale.x(at);
    tip.style.left = `${Math.max(0, Math.min(x + 12, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${plot.offsetTop + 8}px`;
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    cross.classList.add("on");
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cross?.classList.remove("on");
  });
  new ResizeObserver(redraw).observe(plot);
  return element;
}

export function swatch({ color, dash = "" }) {
  const path = s("path", { d: "M0 5h22", "stroke-dasharray": dash });
  path.style.stroke = color;
  return s("svg", { class: "swatch", width: 22, height: 10, "aria-hidden": true }, path);
}
