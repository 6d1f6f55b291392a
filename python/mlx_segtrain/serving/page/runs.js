// What a job's events come to: curves of few points, last values, the log.

import { follow } from "./api.js";
import { line } from "./text.js";

// Points of a curve that is drawn, at most; warnings and samples that are kept.
export const MOST = 600;
const KEPT = 200;
// What is drawn of training metrics besides the loss; names of others, and those of no curve.
const DRAWN = [
  "learning_rate", "tokens_per_sec", "supervised_tokens_per_sec", "grad_norm", "peak_gb", "active_gb",
];
const METRIC = /^[a-z][\w ]{0,79}$/;
const OTHER = ["type", "kind", "step", "loss", "step_s", "left_s", "progress", "message", "ts", ...DRAWN];

// A curve of any length; a long one is drawn in buckets of as many points each.
export class Curve {
  all = [];

  add(x, y) {
    if (Number.isFinite(y)) this.all.push([x, y]);
  }

  // Forgets what lies after x: a run went on from there.
  cut(x) {
    this.all = this.all.filter((point) => point[0] <= x);
  }

  get buckets() {
    const width = Math.ceil(this.all.length / MOST);
    const starts = Array.from({ length: Math.min(this.all.length, MOST) }, (_, i) => i * width);
    return starts.map((start) => this.all.slice(start, start + width)).filter((own) => own.length);
  }

  // Of each bucket the mean: of a short curve all points.
  get points() {
    const mean = (own, i) => own.reduce((sum, point) => sum + point[i], 0) / own.length;
    return this.buckets.map((own) => [mean(own, 0), mean(own, 1)]);
  }

  // Of each bucket of a long curve the lowest and the highest point, so that no spike is lost.
  get extremes() {
    if (this.all.length <= MOST) return [];
    const pick = (own, better) => own.reduce((a, b) => (better(b[1], a[1]) ? b : a));
    return this.buckets.flatMap((own) =>
      [pick(own, (a, b) => a < b), pick(own, (a, b) => a > b)].sort(([a], [b]) => a - b));
  }

  get lowest() {
    return this.all.reduce((low, [, y]) => (low === null || y < low ? y : low), null);
  }

  get highest() {
    return this.all.reduce((high, [, y]) => (high === null || y > high ? y : high), null);
  }
}

// What the events of a job came to so far.
export class Run {
  place = 0; // in the job's log
  following = false;
  lines = []; // of the log, each with its kind
  stage = "";
  message = "";
  iters = null;
  step = 0;
  planned = null; // the gigabytes that the plan takes, of the budget
  train = {}; // the last training metrics
  val = {}; // the last evaluation
  live = {}; // where it is since then: step, memory, the seconds that are left
  first = null; // what the first evaluation came to
  curves = {};
  warnings = [];
  samples = [];

  // `measure` is what the run is judged by: its loss, or its reward.
  constructor(id, measure = "loss") {
    Object.assign(this, { id, measure });
  }

  // Reads what is new until the job has ended; then calls `ended`.
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

  // Between two reports.
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

  // Metrics of a method besides what it is judged by.
  get extra() {
    const other = [...OTHER, this.measure];
    return Object.keys(this.train).filter((name) => !other.includes(name) && METRIC.test(name));
  }

  // Seconds that are left, with the evaluations and checkpoints to come.
  get left() {
    return this.live.left_s >= 0 ? this.live.left_s : null;
  }
}

function keep(list, own) {
  list.push(own);
  if (list.length > KEPT) list.shift();
}
