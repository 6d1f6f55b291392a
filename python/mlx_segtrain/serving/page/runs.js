// What a job's events come to: curves of few points, last values, the log.

import { follow } from "./api.js";
import { line } from "./text.js";

// Points of a curve, about; and of warnings and samples those that are kept.
export const MOST = 600;
const KEPT = 200;
// What is drawn of training metrics besides the loss; names of others, and those of no curve.
const DRAWN = ["learning_rate", "tokens_per_sec", "grad_norm", "peak_gb", "active_gb"];
const METRIC = /^[a-z]\w{0,39}$/;
const OTHER = ["type", "kind", "step", "loss", "step_s", "progress", "message", "ts", ...DRAWN];

// Two neighbouring buckets as one: how many points, their sums, the lowest and the highest.
const joined = (a, b) => ({
  n: a.n + b.n,
  sums: [a.sums[0] + b.sums[0], a.sums[1] + b.sums[1]],
  low: b.low[1] < a.low[1] ? b.low : a.low,
  high: b.high[1] > a.high[1] ? b.high : a.high,
});

// A curve of any length in buckets of as many points each, so that no spike is lost.
export class Curve {
  buckets = [];
  width = 1; // points of a bucket

  add(x, y) {
    if (!Number.isFinite(y)) return;
    const [point, last] = [[x, y], this.buckets.at(-1)];
    const one = { n: 1, sums: point, low: point, high: point };
    if (last && last.n < this.width) this.buckets[this.buckets.length - 1] = joined(last, one);
    else this.buckets.push(one);
    if (this.buckets.length > MOST) {
      this.width *= 2;
      const [all, pairs] = [this.buckets, []];
      for (let i = 0; i < all.length; i += 2) {
        pairs.push(i + 1 < all.length ? joined(all[i], all[i + 1]) : all[i]);
      }
      this.buckets = pairs;
    }
  }

  // Forgets what lies after x: a run went on from there.
  cut(x) {
    this.buckets = this.buckets.filter((own) => Math.max(own.low[0], own.high[0]) <= x);
  }

  // Of each bucket the mean: of short curves all points.
  get points() {
    return this.buckets.map(({ n, sums }) => [sums[0] / n, sums[1] / n]);
  }

  // Of each bucket of a long curve the lowest and the highest point.
  get extremes() {
    if (this.width === 1) return [];
    return this.buckets.flatMap(({ low, high }) =>
      low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low],
    );
  }

  get lowest() {
    return this.buckets.length ? Math.min(...this.buckets.map((own) => own.low[1])) : null;
  }
}

// What the events of a job came to so far. `count` grows with each; `following` while more may come.
export class Run {
  count = 0;
  place = 0; // in the job's log
  lines = []; // of the log, each with its kind
  stage = "";
  message = "";
  iters = null;
  step = 0;
  planned = null; // the gigabytes that the plan takes, of the budget
  train = {}; // the last training metrics
  val = {}; // the last evaluation
  first = null; // the first validation loss
  curves = {};
  warnings = [];
  samples = [];
  following = false;

  constructor(id) {
    this.id = id;
  }

  // Reads what is new until the job has ended; then calls `ended`.
  follow(ended = () => {}) {
    if (this.following) return;
    this.following = true;
    const take = (event, place) => {
      this.place = place;
      this.take(event);
    };
    this.stop = follow(this.id, this.place, take, () => {
      this.following = false;
      ended();
    });
  }

  curve(name) {
    return (this.curves[name] ??= new Curve());
  }

  take(event) {
    this.count += 1;
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

  #measure(event) {
    const step = event.step || 0;
    this.step = Math.max(this.step, step);
    if (event.kind === "train") {
      this.train = event;
      this.curve("train").add(step, event.loss);
      for (const name of [...DRAWN, ...this.extra]) this.curve(name).add(step, event[name]);
    } else if (event.kind === "val") {
      this.val = event;
      this.first ??= event.loss;
      this.curve("val").add(step, event.loss);
    }
  }

  // Metrics of preference methods.
  get extra() {
    return Object.keys(this.train).filter((name) => !OTHER.includes(name) && METRIC.test(name));
  }

  // Seconds of training that are left, by the last step's.
  get left() {
    const { step_s } = this.train;
    return this.iters && step_s >= 0 ? Math.max(0, this.iters - this.step) * step_s : null;
  }
}

function keep(list, own) {
  list.push(own);
  if (list.length > KEPT) list.shift();
}
