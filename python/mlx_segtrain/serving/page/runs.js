// Collects a job's events: curves, last values, and the log.

import { follow } from "./api.js";
import { line } from "./text.js";

// Maximum number of points of a drawn curve, and of warnings and samples that are kept.
export const MOST = 600;
const KEPT = 200;
// Training metrics with a curve, besides the loss; a pattern for the names of other metrics; fields without a curve.
const DRAWN = [
  "learning_rate", "tokens_per_sec", "supervised_tokens_per_sec", "grad_norm", "peak_gb", "active_gb",
  "skew_s",
];
const METRIC = /^[a-z][\w ]{0,79}$/;
const OTHER = ["type", "kind", "step", "loss", "step_s", "left_s", "progress", "message", "ts",
  "ranks", "slowest", ...DRAWN];

// Returns the point with the lower or the higher value.
const lower = (a, b) => (b[1] < a[1] ? b : a);
const higher = (a, b) => (b[1] > a[1] ? b : a);

// A curve of any length. A long curve is drawn in buckets, each with the same number of points.
export class Curve {
  all = [];

  add(x, y) {
    if (Number.isFinite(y)) this.all.push([x, y]);
  }

  // Removes the points after x, the step from which a run was resumed.
  cut(x) {
    this.all = this.all.filter((point) => point[0] <= x);
  }

  get buckets() {
    const width = Math.ceil(this.all.length / MOST);
    const starts = Array.from({ length: Math.min(this.all.length, MOST) }, (_, i) => i * width);
    return starts.map((start) => this.all.slice(start, start + width)).filter((own) => own.length);
  }

  // The means of the buckets; for a short curve, all points.
  get points() {
    const mean = (own, i) => own.reduce((sum, point) => sum + point[i], 0) / own.length;
    return this.buckets.map((own) => [mean(own, 0), mean(own, 1)]);
  }

  // The lowest and the highest point of each bucket of a long curve, so that spikes stay visible.
  get extremes() {
    if (this.all.length <= MOST) return [];
    return this.buckets.flatMap((own) =>
      [own.reduce(lower), own.reduce(higher)].sort(([a], [b]) => a - b));
  }

  get lowest() {
    return this.all.length ? this.all.reduce(lower)[1] : null;
  }

  get highest() {
    return this.all.length ? this.all.reduce(higher)[1] : null;
  }
}

// The state of a job, computed from its events.
export class Run {
  place = 0; // in the job's log
  following = false;
  lines = []; // the lines of the log, with their kinds
  stage = "";
  message = "";
  iters = null;
  step = 0;
  planned = null; // the peak of the plan and the budget, in GB
  train = {}; // the last training metrics
  val = {}; // the last evaluation
  live = {}; // the current step, memory, and remaining time
  first = null; // the value of the first evaluation
  curves = {};
  warnings = [];
  samples = [];

  // `measure` is "loss" or "reward".
  constructor(id, measure = "loss") {
    Object.assign(this, { id, measure });
  }

  // Reads new events until the job has ended, and then calls `ended`.
  follow(ended = () => {}) {
    if (this.following) return;
    this.following = true;
    const end = () => {
      this.following = false;
      ended();
    };
    this.stop = follow(this.id, this.place, (event, place) => this.take(event, place), end);
  }

  curve(name) {
    return (this.curves[name] ??= new Curve());
  }

  take(event, place) {
    this.place = place;
    if (event.type === "step") return this.#step(event);
    const kind = event.kind === "val" ? "val" : event.type === "log" ? "log-line" : event.type;
    this.lines.push([line(event), kind]);
    if (event.type === "stage") this.#begin(event);
    else if (event.type === "warning") keep(this.warnings, String(event.message));
    else if (event.type === "sample") keep(this.samples, event);
    else if (event.type === "metric") this.#measure(event);
  }

  #begin({ stage, message, iters, step, planned_gb, budget_gb }) {
    [this.stage, this.message] = [String(stage), String(message)];
    if (stage === "train") {
      [this.iters, this.step] = [iters ?? null, step || 0];
      Object.values(this.curves).forEach((curve) => curve.cut(this.step));
    }
    if (Number.isFinite(planned_gb) && Number.isFinite(budget_gb)) {
      this.planned = [planned_gb, budget_gb];
    }
  }

  // An event between two reports.
  #step(event) {
    this.live = event;
    this.step = Math.max(this.step, event.step || 0);
  }

  #measure(event) {
    const step = event.step || 0;
    this.step = Math.max(this.step, step);
    const value = event[this.measure];
    if (event.kind === "train") {
      this.train = this.live = event;
      this.curve("train").add(step, value);
      for (const name of [...DRAWN, ...this.extra]) this.curve(name).add(step, event[name]);
    } else if (event.kind === "val") {
      this.val = event;
      this.first ??= value;
      this.curve("val").add(step, value);
    }
  }

  get best() {
    const curve = this.curve("val");
    return this.measure === "reward" ? curve.highest : curve.lowest;
  }

  // The names of a method's own metrics.
  get extra() {
    const other = [...OTHER, this.measure];
    return Object.keys(this.train).filter((name) => !other.includes(name) && METRIC.test(name));
  }

  // The remaining seconds, including evaluations and checkpoints.
  get left() {
    return this.live.left_s >= 0 ? this.live.left_s : null;
  }
}

function keep(list, own) {
  list.push(own);
  if (list.length > KEPT) list.shift();
}
