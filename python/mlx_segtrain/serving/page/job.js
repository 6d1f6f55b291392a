// /finetune/job/ID: the page of a running or finished job, which shows its record (/api/jobs/ID) and its log.

import after from "./after.js";
import { api, every } from "./api.js";
import { COLORS, DASHES, chart, linesOf } from "./charts.js";
import { completionsView } from "./completions.js";
import { copies } from "./copies.js";
import { announce, badge, button, card, confirm, dialog, empty } from "./dom.js";
import { facts, field, h, input, link, meter, notice, show, table } from "./dom.js";
import { logView } from "./log.js";
import { broken, ended, judged, shownResult } from "./results.js";
import { Run } from "./runs.js";
import { ago, count, duration, fixed, gb, percent, rate, sentence, titled, took } from "./text.js";

// The small charts: title, curves with their names, unit, and the format of the last value.
const SMALL = [
  ["Learning rate", { learning_rate: "Learning rate" }, "", rate],
  ["Speed", { tokens_per_sec: "all", supervised_tokens_per_sec: "in the loss" }, " tokens/s",
    (n) => `${count(n)} tokens/s`],
  ["Gradient norm", { grad_norm: "Gradient norm" }, "", (x) => fixed(x, 3)],
  ["Memory", { peak_gb: "peak", active_gb: "now" }, " GB", gb],
  ["Skew of ranks", { skew_s: "Skew" }, " s", (x) => `${fixed(x, 3)} s`],
];
const DRAWN = SMALL.flatMap(([, names]) => Object.keys(names));

export default async function jobPage(main, id) {
  const address = `/api/jobs/${encodeURIComponent(id)}`;
  let row = null;
  try {
    ({ job: row } = await api(address));
  } catch (error) {
    if (error.status !== 404) throw error;
    document.title = "Job not found – mlx_segtrain";
    return main.append(h("h1", "Job not found"), empty(`There is no job ${id}. It may have been deleted.`),
      link("All jobs", "/finetune/jobs"));
  }
  const { trains } = row;
  const values = JSON.parse(row.config_json);
  const [schema, { device }] = await Promise.all([
    trains && api("/api/finetune/defaults"), api("/api/state")]);
  const measure = judged(row);
  const run = new Run(row.id, measure);
  let [shown, described, drawn, told] = ["", "", "", ""]; // the states that are shown
  let [acted, training] = [false, false];

  // Elements

  const buttons = h("div.actions");
  const title = h("h1");
  const about = h("div.stack");
  const problem = h("div");
  const status = h("div");
  const times = h("span.muted.small");
  const filled = h("div.filled");
  const bar = h("div.meter", { role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0,
    "aria-valuemax": 100 }, filled);
  const progress = h("p.wrap", "Reading the log …");
  const memory = h("div");
  const ranks = h("div");
  const tiles = h("div");
  const outcome = h("div.stack");
  const use = h("div.stack");
  const loss = chart(`Training and validation ${measure}`, { tall: true,
    axis: row.rewarded ? measure : `loss, ${row.loss_unit}` });
  const noLoss = h("p.empty");
  const losses = card(titled(measure), tiles, loss, noLoss);
  const small = {};
  const charts = h("div.charts");
  const over = card("Metrics", charts);
  const remarks = h("div.stack");
  const log = logView(run);
  const made = values.method === "grpo" && completionsView(row.id);
  const inWords = (value) => (Array.isArray(value) ? value.join(", ")
    : typeof value === "object" ? JSON.stringify(value) : String(value));
  const given = Object.entries(values).filter(([, value]) => value !== null);
  over.hidden = true;
  main.append(
    h("div.row-line.between", h("div", title, h("p.muted.small", `${row.title} · ${row.id}`)), buttons),
    about,
    problem,
    card("", h("div.row-line.between", status, times), bar, progress, memory),
    outcome,
    trains ? losses : "",
    use,
    ranks,
    trains ? over : "",
    made ? made.element : "",
    remarks,
    log.element,
    card("Configuration", facts("wide", given.map(([name, value]) => [name, inWords(value)])),
      trains && copies(() => values)));

  // Updates

  async function look() {
    try {
      ({ job: row } = await api(address));
    } catch (error) {
      if (error.status !== 404 || shown === "deleted") throw error;
      shown = "deleted"; // from another page
      show(buttons);
      return show(outcome, notice("The job has been deleted.", "warn", { role: "alert" }));
    }
    if (row.status === "queued") ({ training } = await api("/api/state"));
    showDescription();
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

  function showDescription() {
    const state = JSON.stringify([row.name, row.note, row.tags]);
    if (state === described) return;
    described = state;
    title.textContent = row.name;
    document.title = `${row.name} – mlx_segtrain`;
    show(about, row.tags.length > 0 && h("ul.tags", { "aria-label": "Tags" }, row.tags.map((tag) =>
      h("li", h("a.tag", { href: `/finetune/jobs?find=${encodeURIComponent(tag)}` }, tag)))),
    row.note && h("p.note", row.note));
  }

  function describe() {
    const label = input("", { maxlength: 120 });
    const tags = input("for example: long, second try", { maxlength: 400 });
    const note = h("textarea", { rows: 4, maxlength: 4000 });
    [label.value, tags.value, note.value] = [row.label, row.tags.join(", "), row.note];
    dialog("Name, tags and note", [field("Name", label, { about: "If empty, its model and data are shown." }),
      field("Tags", tags, { about: "Words by which you can find the job, separated by commas." }),
      field("Note", note)], "Save", async () => {
      const words = tags.value.split(",").map((x) => x.trim()).filter(Boolean);
      const said = { label: label.value, tags: words, note: note.value };
      await api(address, said, { method: "PATCH" });
      await lookAgain();
    });
  }

  const like = (more = "") => `/finetune?origin=${encodeURIComponent(row.id)}${more}`;

  function showButtons() {
    const stop = row.cancelling ? "Stop now" : "Cancel";
    show(buttons,
      !ended(row) && button(stop, () => act("/cancel"), "danger"),
      row.status === "cancelled" && again("primary"),
      trains && button("New run like this", () => location.assign(like())),
      button("Edit name", describe),
      ended(row) && button("Delete", remove, "danger"));
    // The focused button was removed.
    if (acted && document.activeElement === document.body) buttons.querySelector("button").focus();
  }

  const again = (kind = "") =>
    button(trains ? "Resume" : "Run again", () => act("/resume"), kind);

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
    const kept = row.output_path ? ` Its output will stay in ${row.output_path}.` : "";
    const said = `The job and its log will be deleted.${kept}`;
    if (await confirm("Delete this job?", said, "Delete the job")) act("", "DELETE");
  }

  // Explains a failure, and offers buttons that may help.
  function help() {
    const change = trains && button("Change the settings", () => location.assign(like()), "primary");
    const less = trains &&
      button("New run that uses less memory", () => location.assign(like("&less")), "primary");
    const { fault } = row;
    const said = {
      input: trains && "Change the settings or the data first: a resumed run would fail again.",
      memory: "The device does not have enough memory for this run: lower the context length or the batch size.",
      killed: "The process was killed, either by a person or by the system because memory ran out.",
      run: "The message above says what happened.",
      bug: "This is a bug, not your fault. The log below contains the traceback: please include it in a report.",
    }[fault];
    const logged = button("Show the log", () => log.element.scrollIntoView());
    const own = { input: trains ? [change] : [again()], memory: trains ? [less, again()] : [again()],
      killed: [again("primary"), less], run: [again("primary"), change], bug: [logged, again()] };
    const login = row.kind === "push" && link("Push again from the library", "/finetune/library");
    return [said && h("p.muted", said), h("div.actions", own[fault] ?? [again("primary")], login)];
  }

  async function showOutcome() {
    const { error, message, output_path } = row;
    const done = row.status === "done";
    show(use);
    show(outcome, {
      failed: () => [notice(`Failed: ${sentence(error || "its log shows the reason")}`, "bad", { role: "alert" }),
        help()],
      cancelled: () => notice(`Cancelled: ${sentence(message || "nothing was kept")}`, "warn"),
      done: () => !trains && card("Result", shownResult(row)),
    }[row.status]?.());
    if (trains && done && output_path) {
      const own = await after(row, values, schema.fields);
      show(use, card("Use the adapter", shownResult(row), own));
    }
  }

  function draw() {
    showProgress();
    if (drawn === `${run.place} ${row.status}`) return;
    drawn = `${run.place} ${row.status}`;
    if (trains) {
      showTiles();
      showMemory();
      showRanks();
      showCurves();
    }
    if (made) made.draw(run);
    showRemarks();
    log.draw();
  }

  function showProgress() {
    const waits = row.status === "queued";
    // A run that failed or was cancelled shows its steps: its row's progress also counts loading.
    const share = broken(row) && run.iters ? run.step / run.iters : row.progress;
    const parts = [];
    if (trains && run.iters && !waits) {
      parts.push(`Step ${count(run.step)} of ${count(run.iters)}`);
    } else if (!waits && !broken(row)) parts.push(percent(share));
    else if (row.computes && training) parts.push("Waiting for the current job");
    else parts.push("Starts in a moment");
    if (row.status === "running") {
      if (row.cancelling) parts.push("stopping after the current step");
      else if (run.stage !== "train" && !run.live.step) parts.push(run.message);
      else if (run.left !== null) parts.push(`about ${duration(run.left)} left`);
    }
    bar.hidden = broken(row) && !run.iters;
    filled.style.width = percent(share).replace(/\s/, "");
    bar.setAttribute("aria-valuenow", Math.round(100 * share));
    progress.textContent = parts.filter(Boolean).join(" · ");
    const ran = row.started_at ? ` · ran ${took(row)}` : "";
    times.textContent = `created ${ago(row.created_at)}${ran}`;
  }

  // Shows the last training and validation values; other metrics have their own charts.
  function showTiles() {
    const { train, val, first, best } = run;
    const change = val[measure] - first;
    const sign = change <= 0 ? "−" : "+";
    const since = `${fixed(first)} at first, ${sign}${fixed(Math.abs(change))}`;
    const better = best === val[measure] ? "" : `, best ${fixed(best)}`;
    const none = ended(row) ? "no validation data" : "no evaluation yet";
    const over = row.rewarded ? "" : ` ${row.loss_unit}`;
    const pairs = [
      [`Training ${measure}`, fixed(train[measure]),
        train.step && `mean of the last steps, up to step ${count(train.step)}${over && `,${over}`}`],
      [`Validation ${measure}`, fixed(val[measure]), best === null ? none : since + better],
    ];
    show(tiles, facts("tiles", pairs.map(([name, value, more]) =>
      [name, [value, h("div.more", more || "")]])));
  }

  function showMemory() {
    const { live, planned } = run;
    const now = row.status === "running" ? live.active_gb : null;
    const used = now ?? live.peak_gb;
    if (!planned) return show(memory);
    const [plan, budget] = planned;
    const words = [Number.isFinite(now) && `${gb(now)} in use`,
      Number.isFinite(live.peak_gb) && `peak ${gb(live.peak_gb)}`,
      `planned ${gb(plan)} of ${gb(budget)}`].filter(Boolean).join(", ");
    show(memory, meter((used ?? plan) / budget, { role: "img", "aria-label": `Memory: ${words}` }),
      h("p.small.muted", `Memory on ${device.name}: ${words}`));
  }

  // Shows the last report of each process of a run.
  function showRanks() {
    const { ranks: own, slowest, skew_s } = run.train;
    if (!Array.isArray(own)) return;
    const seconds = (x) => `${fixed(x, 3)} s`;
    const rows = own.map((x, i) => h("tr", h("td", `Rank ${i}`),
      [count(x.tokens_per_sec), seconds(x.busy_s), seconds(x.waited_s), gb(x.peak_gb)].map((text) =>
        h("td", text))));
    const names = ["Process", "Tokens/s", "Work per step", "Wait per step", "Peak memory"];
    show(ranks, card("Ranks", h("p", `Rank ${slowest} is the slowest: the others wait for it. It ` +
      `works ${seconds(skew_s)} longer per step than the fastest rank.`),
    h("div.scroll", table("", "Figures of each rank", names, rows))));
  }

  function showCurves() {
    const points = run.curve("val").points;
    const val = { name: "validation", points, color: COLORS[1], dash: DASHES[1], marked: true };
    const lines = [...linesOf("training", run.curve("train"), COLORS[0]), val];
    const some = lines.some((line) => line.points.length);
    [loss.hidden, noLoss.hidden, tiles.hidden] = [!some, some, !some];
    losses.hidden = !some && ended(row); // it ended before the first step
    noLoss.textContent = "Waiting for the first step.";
    // The axis ends at the last step of the run, unless the curve would be too short to be seen.
    const end = run.iters && run.step >= run.iters / 5 ? run.iters : null;
    loss.draw(lines, { end, legend: true });
    const rest = run.extra.filter((name) => !DRAWN.includes(name));
    const extra = rest.map((name) => [titled(name), { [name]: titled(name) }, "", fixed]);
    for (const [title, names, unit, said] of [...SMALL, ...extra]) {
      const own = Object.entries(names).flatMap(([name, label], i) =>
        linesOf(label, run.curve(name), COLORS[i], DASHES[i]));
      if (!own.some((line) => line.points.length)) continue;
      if (!small[title]) {
        small[title] = chart(`${title} by step`, { unit });
        small[title].last = h("span.muted");
        charts.append(h("div", h("h3", title, " ", small[title].last), small[title]));
        over.hidden = false;
      }
      small[title].last.textContent = said(run.train[Object.keys(names)[0]]);
      small[title].draw(own, { end, legend: Object.keys(names).length > 1 });
    }
  }

  function showRemarks() {
    const { warnings, samples } = run;
    const own = [...new Set(warnings)];
    const state = JSON.stringify([own, samples].map((all) => [all.length, all.at(-1)]));
    if (state === told) return;
    told = state;
    const last = own.slice(-20).map((message) => notice(sentence(message), "warn"));
    show(remarks,
      own.length > 0 && card(`Warnings (${own.length})`, last),
      samples.length > 0 && card("Samples", shownSamples(samples)));
  }

  const lookAgain = every(1, look);
  every(0.5, draw);
  await lookAgain();
}

// The answers to each sample prompt, newest first.
function shownSamples(samples) {
  return Object.entries(Object.groupBy(samples, ({ prompt }) => prompt)).map(([prompt, own]) => {
    const last = own.slice(-6).reverse();
    const pairs = last.map(({ step, text }) => [`step ${step}`, String(text)]);
    return [h("h3.wrap", prompt), facts("samples", pairs)];
  });
}
