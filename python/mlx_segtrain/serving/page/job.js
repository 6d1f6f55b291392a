// /finetune/job/ID: a job while it runs and after. What is shown comes from its row and its log.

import after from "./after.js";
import { api, every } from "./api.js";
import { COLORS, DASHES, chart, linesOf } from "./charts.js";
import { announce, badge, button, card, confirm, empty } from "./dom.js";
import { facts, h, link, notice, show } from "./dom.js";
import { logView } from "./log.js";
import { shownResult } from "./results.js";
import { Run } from "./runs.js";
import { ago, count, duration, fixed, gb, percent, rate, titled, took } from "./text.js";

// The small charts: title, curves with their names, unit.
const SMALL = [
  ["Learning rate", { learning_rate: "Learning rate" }, ""],
  ["Speed, tokens/s", { tokens_per_sec: "Speed" }, " tokens/s"],
  ["Gradient norm", { grad_norm: "Gradient norm" }, ""],
  ["Memory, GB (dashed: now)", { peak_gb: "peak", active_gb: "now" }, " GB"],
];

export default async function jobPage(main, id) {
  const address = `/api/jobs/${encodeURIComponent(id)}`;
  let row = null;
  try {
    ({ job: row } = await api(address));
  } catch (error) {
    if (error.status !== 404) throw error;
    document.title = "No such job – mlx_segtrain";
    const said = empty(`There is no job ${id} (any more).`);
    return main.append(h("h1", "No such job"), said, link("All jobs", "/finetune/jobs"));
  }
  document.title = `${row.name} – mlx_segtrain`;
  const { trains } = row;
  const values = JSON.parse(row.config_json);
  const schema = trains && (await api("/api/finetune/defaults"));
  const run = new Run(row.id);
  let [shown, drawn, told] = ["", "", ""]; // states that are shown
  let [acted, training] = [false, false];
  const ended = () => ["done", "failed", "cancelled"].includes(row.status);
  const broken = () => ["failed", "cancelled"].includes(row.status);

  // What does not change

  const buttons = h("div.actions");
  const problem = h("div");
  const status = h("div");
  const times = h("span.muted.small");
  const filled = h("div.filled");
  const bar = h("div.meter", { role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0,
    "aria-valuemax": 100 }, filled);
  const progress = h("p.wrap", "Reading the log …");
  const tiles = h("div");
  const outcome = h("div.stack");
  const loss = chart("Training and validation loss over steps", { tall: true });
  const noLoss = h("p.empty");
  const small = {};
  const charts = h("div.charts");
  const over = card("Over the steps", charts);
  const remarks = h("div.stack");
  const log = logView(run);
  const inWords = (value) => (Array.isArray(value) ? value.join(", ")
    : typeof value === "object" ? JSON.stringify(value) : String(value));
  const given = Object.entries(values).filter(([, value]) => value !== null);
  over.hidden = true;
  main.append(
    h("div.row-line.between",
      h("div", h("h1", row.name), h("p.muted.small", `${row.title} · ${row.id}`)),
      buttons),
    problem,
    card("", h("div.row-line.between", status, times), bar, progress, tiles),
    outcome,
    trains ? card(`Loss, ${schema.loss_units[values.method ?? "sft"]}`, loss, noLoss) : "",
    trains ? over : "",
    remarks,
    log.element,
    card("Configuration", facts("wide", given.map(([name, value]) => [name, inWords(value)]))));

  // What does

  async function look() {
    try {
      ({ job: row } = await api(address));
    } catch (error) {
      if (error.status !== 404 || shown === "deleted") throw error;
      shown = "deleted"; // on another page
      show(buttons);
      return show(outcome, notice("The job has been deleted.", "warn", { role: "alert" }));
    }
    if (row.status === "queued") ({ training } = await api("/api/state"));
    const state = `${row.status} ${row.cancelling}`;
    if (state !== shown) {
      if (shown) announce(`The job is ${row.status}.`);
      shown = state;
      showButtons();
      show(status, badge(row.status));
      showOutcome();
      run.follow(lookAgain);
    }
    draw();
  }

  function showButtons() {
    const like = `/finetune?origin=${encodeURIComponent(row.id)}`;
    const stop = row.cancelling ? "Do not wait for the step" : "Cancel";
    show(buttons,
      !ended() && button(stop, () => act("/cancel"), "danger"),
      broken() && button(trains ? "Resume" : "Run again", () => act("/resume"), "primary"),
      trains && button("New run like this", () => location.assign(like)),
      ended() && button("Delete", remove, "danger"));
    // The button that had the focus is gone.
    if (acted && document.activeElement === document.body) buttons.querySelector("button").focus();
  }

  async function act(what, method = "POST") {
    show(problem);
    try {
      await api(address + what, undefined, { method });
      if (method === "DELETE") return location.assign("/finetune/jobs");
      acted = true;
      await lookAgain();
    } catch (error) {
      show(problem, notice(error.message, "warn", { role: "alert" }));
    }
  }

  async function remove() {
    const kept = row.output_path ? ` What it wrote stays in ${row.output_path}.` : "";
    const said = `The job and its log are forgotten.${kept}`;
    if (await confirm("Delete this job?", said, "Delete the job")) act("", "DELETE");
  }

  async function showOutcome() {
    const { error, message, output_path } = row;
    const place = h("div.stack");
    const use = trains && output_path;
    show(outcome, {
      failed: () => notice(`Failed: ${error || "its log says why"}`, "bad", { role: "alert" }),
      cancelled: () => notice(`Cancelled: ${message || "nothing was kept"}.`, "warn"),
      done: () => [card("Result", shownResult(row)), use && card("Use the adapter", place)],
    }[row.status]?.());
    if (use && row.status === "done") show(place, await after(row, values, schema.fields));
  }

  function draw() {
    showProgress();
    if (drawn === `${run.lines.length} ${row.status}`) return;
    drawn = `${run.lines.length} ${row.status}`;
    if (trains) {
      showTiles();
      showCurves();
    }
    showRemarks();
    log.draw();
  }

  function showProgress() {
    const waits = row.status === "queued";
    // Of a run that was ended, the row's own share is that of its end.
    const share = broken() && run.iters ? run.step / run.iters : row.progress;
    const parts = [];
    if (trains && run.iters && !waits) {
      parts.push(`Step ${count(run.step)} of ${count(run.iters)}`);
    }
    if (!waits) parts.push(percent(share));
    else if (row.computes && training) parts.push("Waits for the job that computes now");
    else parts.push("Starts in a moment");
    if (row.status === "running") {
      if (row.cancelling) parts.push("cancelling: it ends behind the step that is being taken");
      else if (run.stage !== "train" && !run.train.step) parts.push(run.message);
      else if (run.left !== null) parts.push(`about ${duration(run.left)} left`);
    }
    filled.style.width = percent(share).replace(/\s/, "");
    bar.setAttribute("aria-valuenow", Math.round(100 * share));
    progress.textContent = parts.filter(Boolean).join(" · ");
    const ran = row.started_at ? ` · ran ${took(row)}` : "";
    times.textContent = `created ${ago(row.created_at)}${ran}`;
  }

  function showTiles() {
    const { train, val, planned } = run;
    const best = run.curve("val").lowest;
    const since = `from ${fixed(run.first)}, best ${fixed(best)}`;
    const begun = Number.isFinite(train.tokens_per_sec);
    const speed = begun ? `${count(train.tokens_per_sec)} tokens/s` : "–";
    const plan = planned && `planned ${gb(planned[0])} of ${gb(planned[1])}`;
    const pairs = [
      ["Training loss", fixed(train.loss)],
      ["Validation loss", fixed(val.loss), best === null ? "no evaluation yet" : since],
      ["Learning rate", rate(train.learning_rate)],
      ["Speed", speed, begun && `${fixed(train.step_s, 2)} s a step`],
      ["Gradient norm", fixed(train.grad_norm, 3)],
      ["Peak memory", gb(train.peak_gb), plan],
    ];
    show(tiles, facts("tiles", pairs.map(([name, value, more]) =>
      [name, [value, h("div.more", more)]])));
  }

  function showCurves() {
    const points = run.curve("val").points;
    const val = { name: "validation", points, color: COLORS[1], dash: DASHES[1], marked: true };
    const lines = [...linesOf("training", run.curve("train"), COLORS[0]), val];
    const some = lines.some((line) => line.points.length);
    [loss.hidden, noLoss.hidden] = [!some, some];
    noLoss.textContent = ended() ? "No step was taken." : "It begins with the first step.";
    // Up to the run's end, unless its curve would be a scratch at the edge.
    const end = run.iters && run.step >= run.iters / 5 ? run.iters : null;
    loss.draw(lines, { end, legend: true });
    const extra = run.extra.map((name) => [titled(name), { [name]: titled(name) }, ""]);
    for (const [title, names, unit] of [...SMALL, ...extra]) {
      const own = Object.entries(names).flatMap(([name, label], i) =>
        linesOf(label, run.curve(name), COLORS[i], DASHES[i]));
      if (!own.some((line) => line.points.length)) continue;
      if (!small[title]) {
        small[title] = chart(`${title} over steps`, { unit });
        charts.append(h("div", h("h3", title), small[title]));
        over.hidden = false;
      }
      small[title].draw(own, { end });
    }
  }

  function showRemarks() {
    const { warnings, samples } = run;
    const state = JSON.stringify([warnings, samples].map((all) => [all.length, all.at(-1)]));
    if (state === told) return;
    told = state;
    const last = warnings.slice(-20).map((message) => notice(message, "warn"));
    show(remarks,
      warnings.length > 0 && card(`Warnings (${warnings.length})`, last),
      samples.length > 0 && card("Samples", shownSamples(samples)));
  }

  const lookAgain = every(1, look);
  every(0.5, draw);
  await lookAgain();
}

// Each prompt's answers, the newest first.
function shownSamples(samples) {
  return Object.entries(Object.groupBy(samples, ({ prompt }) => prompt)).map(([prompt, own]) => {
    const last = own.slice(-6).reverse();
    const pairs = last.map(({ step, text }) => [`step ${step}`, String(text)]);
    return [h("h3.wrap", prompt), facts("samples", pairs)];
  });
}
