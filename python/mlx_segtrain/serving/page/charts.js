// Line charts by step, drawn by uPlot (vendor/), which the page loads as a global variable.

import { announce, button, h, s } from "./dom.js";
import { save } from "./text.js";

export const COLORS = [1, 2, 3, 4, 5, 6].map((i) => `var(--line-${i})`);
// These dashes distinguish the lines for people who cannot distinguish the colours.
export const DASHES = ["", "6 4"];
// The points of a marked line are drawn if there are at most this many.
const FEW = 60;
const { uPlot } = globalThis;
const shown = new Set(); // functions that redraw charts when the theme changes

const redrawAll = () => shown.forEach((draw) => draw());
new MutationObserver(redrawAll)
  .observe(document.documentElement, { attributeFilter: ["data-theme"] });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);

// The lines of a curve: its means and, for a long curve, a pale line through its extremes.
export function linesOf(name, curve, color, dash) {
  const mean = { name, points: curve.points, color, dash };
  const range = { name, points: curve.extremes, color, pale: true };
  return range.points.length ? [mean, range] : [mean];
}

// The exponential moving average, without a bias towards the start.
export function smoothed(points, share) {
  let [sum, weight] = [0, 0];
  return points.map(([x, y]) => {
    [sum, weight] = [share * sum + (1 - share) * y, share * weight + 1 - share];
    return [x, sum / weight];
  });
}

const inWords = (value, digits = 6) =>
  value.toLocaleString("en-US", { maximumSignificantDigits: digits });

// Returns round limits for an axis. They include the earlier limits, so that the axis does not jump.
function rounded(low, high, before) {
  const room = low === high ? Math.abs(low || 1) / 10 : 0;
  let [least, most] = [low - room, high + room];
  if (before) [least, most] = [Math.min(least, before[0]), Math.max(most, before[1])];
  const power = 10 ** Math.floor(Math.log10((most - least) / 4));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= (0.999 * (most - least)) / 4);
  return [Math.floor(least / step + 1e-9) * step, Math.ceil(most / step - 1e-9) * step];
}

const joined = (lines) => uPlot.join(lines.map(({ points }) =>
  [points.map(([x]) => x), points.map(([, y]) => y)]));

// A chart with a method `draw(lines, { end, legend, axis })`. A line has a name, points, a colour and optionally a
// dash. The points of a `marked` line are drawn, too, if there are few; a `pale` line is in the background. `axis` is
// the title of the vertical axis. A tall chart can be smoothed, zoomed and saved. Screen readers read `label`.
export function chart(label, { unit = "", tall = false, axis = "" } = {}) {
  const keys = "arrow keys read values, plus and minus zoom, 0 shows all";
  const plot = h("div.plot", { tabindex: 0, role: "application",
    "aria-label": `${label}; ${keys}`, onkeydown: pressed, onblur: leave });
  const legend = h("div.legend");
  const tip = h("div.tip", { hidden: true });
  const probe = h("span", { hidden: true });
  const element = h(`div.chart.${tall ? "tall" : ""}`);
  const smoothing = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0,
    oninput: () => drawAgain(true) });
  const log = h("input", { type: "checkbox", onchange: () => drawAgain(true) });
  const reset = button("Show all", () => zoom(null), "small");
  const tools = h("div.tools",
    h("label", "Smoothing ", smoothing), h("label", log, " Log scale"),
    button("Zoom in", () => zoom(0.5), "small"), reset,
    button("CSV", () => save(`${label}.csv`, table()), "small"));
  let [drawn, made, full, kept, how] = [null, "", [0, 1], null, {}];
  element.lines = []; // the arguments of `draw`
  element.append(...(tall ? [tools] : []), legend, plot, tip, probe);
  reset.hidden = true;

  const colour = (name) => {
    probe.style.color = name;
    return getComputedStyle(probe).color;
  };
  const isZoomed = () => {
    const { min, max } = drawn.scales.x;
    return min > full[0] || max < full[1];
  };

  element.draw = (lines, given = {}) => {
    [element.lines, how] = [lines, given];
    const named = how.legend ? lines.filter((line) => !line.pale && line.points.length) : [];
    legend.replaceChildren(...named.map((line) => h("span", swatch(line), line.name)));
    drawAgain();
  };

  // Returns the lines to draw: for a smoothed line, also a pale line of the original values.
  function all() {
    const share = Number(smoothing.value);
    return element.lines.filter((line) => line.points.length).flatMap((line) =>
      share && !line.marked && !line.pale
        ? [{ ...line, points: smoothed(line.points, share) }, { ...line, pale: true, raw: true }]
        : [line]);
  }

  // Creates a new plot if the lines or the scale have changed; otherwise only updates the data.
  function drawAgain(anew = false) {
    const { clientWidth: width, clientHeight: height } = plot;
    const lines = all();
    if (!lines.length || !width) {
      drawn?.destroy();
      drawn = null;
      return;
    }
    const positive = log.checked && lines.every(({ points }) => points.every(([, y]) => y > 0));
    const data = joined(lines);
    const most = Math.max(how.end ?? 0, 1, data[0].at(-1));
    const wanted = JSON.stringify([positive, how.axis, lines.map(({ name, color, dash, pale, points, marked }) =>
      [name, color, dash, pale, marked && points.length <= FEW, points.length === 1])]);
    const zoomed = drawn && isZoomed() && [drawn.scales.x.min, drawn.scales.x.max];
    full = [0, most];
    if (anew || wanted !== made || !drawn) {
      drawn?.destroy();
      [made, kept] = [wanted, null];
      drawn = new uPlot(options(lines, width, height, positive), data, plot);
      element.uplot = drawn;
      if (zoomed) drawn.setScale("x", { min: zoomed[0], max: zoomed[1] });
    } else if (zoomed) {
      drawn.setData(data, false);
      drawn.redraw();
    } else {
      drawn.setData(data);
    }
  }

  function options(lines, width, height, positive) {
    const ink = () => colour("var(--muted)");
    const rule = { stroke: () => colour("var(--rule)"), width: 1 };
    const of = (title) => (tall && title ? { label: title, labelSize: 18, labelFont: FONT } : {});
    const y = positive ? { distr: 3 } : { range: (self, low, high) => {
      if (low === null) return kept ?? [0, 1];
      if (isZoomed()) return rounded(low, high);
      return (kept = rounded(low, high, kept));
    } };
    return {
      width, height, padding: [10, 12, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false, dist: 5 }, dataIdx: nearest,
        points: { size: 7 } },
      hooks: { setCursor: [point], setScale: [(self, key) => key === "x" && scaled()] },
      scales: { x: { time: false, range: (self, low, high) =>
        (low === self.data[0][0] && high === self.data[0].at(-1) ? full : [low, high]) }, y },
      axes: [
        { stroke: ink, font: FONT, grid: { show: false }, ticks: { show: false }, size: 22, gap: 4,
          space: 44, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5],
          values: (self, values) => values.map((x) => inWords(x)), ...of("step") },
        { stroke: ink, font: FONT, grid: rule, ticks: { show: false }, gap: 4, space: 30,
          size: (self, values) => 12 + 6.2 * Math.max(3, ...(values ?? []).map((x) => x?.length ?? 0)),
          values: (self, values) => values.map((x) => (x === null ? null : inWords(x))), ...of(how.axis ?? axis) },
      ],
      series: [{}, ...lines.map((line) => ({
        label: line.name, spanGaps: true, width: line.pale ? 1 : 1.8,
        alpha: line.pale ? 0.3 : 1,
        stroke: () => colour(line.color), dash: line.dash ? line.dash.split(" ").map(Number) : null,
        points: { show: line.points.length <= (line.marked ? FEW : 1), size: 6,
          fill: () => colour(line.color) },
      }))],
    };
  }

  // Returns the index of the value of a line that is closest to the cursor.
  function nearest(self, series, at) {
    const values = self.data[series];
    for (let by = 0; by < values.length; by++) {
      if (values[at - by] != null) return at - by;
      if (values[at + by] != null) return at + by;
    }
    return at;
  }

  // Shows the values at the cursor in the tooltip, and returns them.
  function point(self) {
    const at = self.cursor.idx;
    tip.hidden = at == null || self.cursor.left < 0;
    if (tip.hidden) return;
    const x = self.data[0][at];
    const words = all().flatMap((line, i) => {
      if (line.pale) return [];
      const own = nearest(self, i + 1, at);
      const [where, value] = [self.data[0][own], self.data[i + 1][own]];
      const away = where === x ? "" : ` (step ${inWords(Math.round(where))})`;
      return [[line, `${line.name}${away}: `, inWords(value, 5) + unit]];
    });
    tip.replaceChildren(h("div.muted", `step ${inWords(Math.round(x))}`),
      ...words.map(([line, name, value]) => h("div", swatch(line), name, h("b", value))));
    const left = self.bbox.left / devicePixelRatio + self.cursor.left + 12;
    const most = element.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(left, most))}px`;
    tip.style.top = `${plot.offsetTop + 8}px`;
    return [x, words];
  }

  function leave() {
    tip.hidden = true;
    drawn?.setCursor({ left: -10, top: -10 });
  }

  // Zooms in or out around the cursor; null shows all steps.
  function zoom(share) {
    if (!drawn) return;
    const { min, max } = drawn.scales.x;
    const middle = drawn.cursor.idx == null ? max : drawn.data[0][drawn.cursor.idx];
    const length = share === null ? Infinity : (max - min) * share;
    let least = Math.max(full[0], middle - length / 2);
    const most = Math.min(full[1], least + length);
    least = Math.max(full[0], most - length);
    drawn.setScale("x", { min: least, max: most });
  }

  function scaled() {
    if (drawn) reset.hidden = !isZoomed();
  }

  function pressed(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!drawn) return;
    if (step) {
      const last = drawn.data[0].length - 1;
      const at = drawn.cursor.idx == null ? last : drawn.cursor.idx + step;
      const x = drawn.data[0][Math.max(0, Math.min(last, at))];
      drawn.setCursor({ left: drawn.valToPos(x, "x"), top: 0 });
      const [, words] = point(drawn) ?? [0, []];
      announce([`step ${inWords(x)}`, ...words.map(([, ...text]) => text.join(""))].join("; "));
    } else if (event.key === "+") zoom(0.5);
    else if (event.key === "-") zoom(2);
    else if (event.key === "0" || (event.key === "Escape" && isZoomed())) zoom(null);
    else return;
    event.preventDefault();
  }

  // Returns all points, one row per step.
  function table() {
    const lines = element.lines.filter((line) => !line.pale && line.points.length);
    const data = joined(lines);
    return [["step", ...lines.map(({ name }) => name)],
      ...data[0].map((x, i) => [x, ...data.slice(1).map((own) => own[i] ?? "")])];
  }

  new ResizeObserver(() => {
    const { clientWidth: width, clientHeight: height } = plot;
    if (drawn && width) drawn.setSize({ width, height });
    else drawAgain();
  }).observe(plot);
  shown.add(() => element.isConnected && drawn?.redraw(false));
  return element;
}

const FONT = "11px system-ui, sans-serif";

// A short piece of a line, for legends.
export function swatch({ color, dash = "" }) {
  const path = s("path", { d: "M0 5h22", "stroke-dasharray": dash });
  path.style.stroke = color;
  return s("svg", { class: "swatch", width: 22, height: 10, "aria-hidden": true }, path);
}
