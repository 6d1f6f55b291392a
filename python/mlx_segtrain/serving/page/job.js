// /finetune/job/ID: a job while it runs and after. What is shown comes from its row and its log.

import after from "./after.js";
import { api, every } from "./api.js";
import { COLORS, DASHES, chart, linesOf } from "./charts.js";
import { announce, badge, button, card, confirm, empty, facts, h, link, notice, show } from "./dom.js";
import { logView } from "./log.js";
import { shownResult } from "./results.js";
import { Run } from "./runs.js";
import { ago, count, duration, fixed, gb, percent, rate, titled, took } from "./text.js";

const ENDED = ["done", "failed", "cancelled"];
// The small charts: title, curves, unit.
const SMALL = [
  ["Learning rate", ["learning_rate"], ""],
  ["Speed, tokens/s", ["tokens_per_sec"], " tokens/s"],
  ["Gradient norm", ["grad_norm"], ""],
  ["Memory, GB (dashed: now)", ["peak_gb", "active_gb"], " GB"],
];
const LABELS = { peak_gb: "peak", active_gb: "now" };

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
  const values = JSON.parse(row.config_json);
  const defaults = row.trains ? await api("/api/finetune/defaults") : null;
  const run = new Run(row.id);
  let [shown, drawn, told, acted, training] = ["", "", "", false, false];

  // What does not change

  const buttons = h("div.actions");
  const status = h("div");
  const times = h("span.muted.small");
  const filled = h("div");
  const bar = h(
    "div.meter",
    { role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100 },
    filled,
  );
  const progress = h("p.wrap", "Reading the log …");
  const tiles = h("div");
  const outcome = h("div.stack");
  const problem = h("div", { role: "alert" });
  const loss = chart("Training and validation loss over steps", { tall: true });
  const noLoss = h("p.empty");
  const charts = h("div.charts");
  const over = card("Over the steps", charts);
  const small = {};
  const remarks = h("div.stack");
  const log = logView(run);
  const given = Object.entries(values).filter(([, value]) => value !== null);
  const inWords = (value) =>
    Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value);
  main.append(
    h(
      "div.row-line.between",
      h(
        "div",
        h("h1", row.name),
        h("p.muted.small", `${row.title} · ${row.id}`),
      ),
      buttons,
    ),
    problem,
    card("", h("div.row-line.between", status, times), bar, progress, tiles),
    outcome,
    ...(row.trains
      ? [card(`Loss, ${defaults.loss_units[values.method ?? "sft"]}`, loss, noLoss), over]
      : []),
    remarks,
    log.element,
    card("Configuration", facts("wide", given.map(([name, value]) => [name, inWords(value)]))),
  );
  over.hidden = true;

  // What does

  async function look() {
    try {
      ({ job: row } = await api(address));
    } catch (error) {
      if (error.status === 404 && shown !== "deleted") {
        shown = "deleted"; // on another page
        show(buttons);
        show(outcome, notice("The job has been deleted.", "warn", { role: "alert" }));
      }
      throw error;
    }
    const state = `${row.status} ${row.cancelling}`;
    if (row.status === "queued") ({ training } = await api("/api/state"));
    if (state !== shown) {
      if (shown) announce(`The job is ${row.status}.`);
      shown = state;
      showButtons();
      show(status, badge(row.status));
      showOutcome();
      if (!ENDED.includes(row.status)) run.follow(lookAgain);
    }
    draw();
  }

  function showButtons() {
    const { status, cancelling, trains } = row;
    const live = !ENDED.includes(status);
    const again = ["failed", "cancelled"].includes(status);
    const origin = `/finetune?origin=${encodeURIComponent(row.id)}`;
    const words = cancelling ? "Do not wait for the step" : "Cancel";
    show(
      buttons,
      live && button(words, () => act("/cancel", {}), "danger"),
      again && button(trains ? "Resume" : "Run again", () => act("/resume", {}), "primary"),
      trains && button("New run like this", () => location.assign(origin)),
      !live && button("Delete", remove, "danger"),
    );
    // The button that had the focus is gone.
    if (acted && document.activeElement === document.body) buttons.querySelector("button").focus();
  }

  async function act(what, body, more) {
    show(problem);
    try {
      await api(address + what, body, more);
      acted = true;
      if (what) await lookAgain();
      return true;
    } catch (error) {
      show(problem, notice(error.message, "warn"));
      return false;
    }
  }

  async function remove() {
    const kept = row.output_path ? ` What it wrote stays in ${row.output_path}.` : "";
    const said = `The job and its log are forgotten.${kept}`;
    if (!(await confirm("Delete this job?", said, "Delete the job"))) return;
    if (await act("", undefined, { method: "DELETE" })) location.assign("/finetune/jobs");
  }

  async function showOutcome() {
    const { status, error, message } = row;
    show(outcome);
    if (status === "failed") {
      show(outcome, notice(`Failed: ${error || "its log says why"}`, "bad", { role: "alert" }));
    } else if (status === "cancelled") {
      show(outcome, notice(`Cancelled: ${message || "nothing was kept"}.`, "warn"));
    } else if (status === "done") {
      show(outcome, card("Result", shownResult(row)));
      if (row.trains && row.output_path) {
        const place = h("div.stack");
        outcome.append(card("Use the adapter", place));
        show(place, await after(row, values, defaults.fields));
      }
    }
  }

  // Whatever is new, twice a second at most: a long log comes in many events.
  function draw() {
    showProgress();
    const state = `${run.count} ${row.status}`;
    if (state === drawn) return;
    drawn = state;
    if (row.trains) {
      showTiles();
      showCurves();
    }
    showRemarks();
    log.draw();
  }

  function showProgress() {
    const { status, cancelling, trains, computes } = row;
    let share = row.progress;
    if (["failed", "cancelled"].includes(status) && run.iters) share = run.step / run.iters;
    filled.style.width = `${100 * share}%`;
    bar.setAttribute("aria-valuenow", Math.round(100 * share));
    const parts = [];
    if (trains && run.iters && status !== "queued") {
      parts.push(`Step ${count(run.step)} of ${count(run.iters)}`);
    }
    if (status === "queued") {
      const waits = computes && training;
      parts.push(waits ? "Waits for the job that computes now" : "Starts in a moment");
    } else {
      parts.push(percent(share));
    }
    if (status === "running") {
      const steps = run.stage === "train" || run.train.step;
      if (cancelling) parts.push("cancelling: it ends behind the step that is being taken");
      else if (!steps) parts.push(run.message);
      else if (run.left !== null) parts.push(`about ${duration(run.left)} left`);
    }
    progress.textContent = parts.filter(Boolean).join(" · ");
    const ran = row.started_at ? ` · ran ${took(row)}` : "";
    times.textContent = `created ${ago(row.created_at)}${ran}`;
  }

  function showTiles() {
    const { train, val, planned } = run;
    const best = run.curve("val").lowest;
    const since = `from ${fixed(run.first)}, best ${fixed(best)}`;
    const speed = train.tokens_per_sec;
    const told = [
      ["Training loss", fixed(train.loss), ""],
      ["Validation loss", fixed(val.loss), best === null ? "no evaluation yet" : since],
      ["Learning rate", rate(train.learning_rate), ""],
      [
        "Speed",
        Number.isFinite(speed) ? `${count(speed)} tokens/s` : "–",
        train.step_s >= 0 ? `${fixed(train.step_s, 2)} s a step` : "",
      ],
      ["Gradient norm", fixed(train.grad_norm, 3), ""],
      ["Peak memory", gb(train.peak_gb), planned && `planned ${gb(planned[0])} of ${gb(planned[1])}`],
    ];
    const pairs = told.map(([name, value, more]) => [name, [value, h("div.more", more)]]);
    show(tiles, facts("tiles", pairs));
  }

  function showCurves() {
    const points = run.curve("val").points;
    const val = { name: "validation", points, color: COLORS[1], dash: DASHES[1], marked: true };
    const lines = [...linesOf("training", run.curve("train"), COLORS[0]), val];
    const some = lines.some((line) => line.points.length);
    loss.hidden = !some;
    noLoss.hidden = some;
    noLoss.textContent = ENDED.includes(row.status)
      ? "No step was taken."
      : "It begins with the first step.";
    // Up to the run's end, unless its curve would be a scratch at the edge.
    const end = run.iters && run.step >= run.iters / 5 ? run.iters : null;
    loss.draw(lines, { end, legend: true });
    const extra = run.extra.map((name) => [titled(name), [name], ""]);
    for (const [title, names, unit] of [...SMALL, ...extra]) {
      const own = names.flatMap((name, i) =>
        linesOf(LABELS[name] ?? title, run.curve(name), COLORS[i], DASHES[i]),
      );
      if (!own.some((line) => line.points.length)) continue;
      if (!small[title]) {
        small[title] = chart(`${title} over steps`, { unit });
        over.hidden = false;
        charts.append(h("div", h("h3", title), small[title]));
      }
      small[title].draw(own, { end });
    }
  }

  function showRemarks() {
    const { warnings, samples } = run;
    const state = `${warnings.length} ${samples.length} ${warnings.at(-1)} ${samples.at(-1)?.step}`;
    if (state === told) return;
    told = state;
    const last = warnings.slice(-20).map((message) => notice(message, "warn"));
    show(
      remarks,
      warnings.length > 0 && card(`Warnings (${warnings.length})`, last),
      samples.length > 0 && card("Samples", shownSamples(samples)),
    );
  }

  const lookAgain = every(1, look);
  every(0.5, draw);
  await lookAgain();
  run.follow(lookAgain);
}

// Each prompt's answers, the newest first.
function shownSamples(samples) {
  const prompts = [...new Set(samples.map(({ prompt }) => String(prompt)))];
  return prompts.flatMap((prompt) => {
    const own = samples.filter((sample) => String(sample.prompt) === prompt).reverse();
    const pairs = own.slice(0, 6).map(({ step, text }) => [`step ${step}`, String(text)]);
    return [h("h3.wrap", prompt), facts("samples", pairs)];
  });
}
