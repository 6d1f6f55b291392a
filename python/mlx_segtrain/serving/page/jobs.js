// /finetune/jobs: all jobs, and the losses of several runs in one chart.

import { api, every } from "./api.js";
import { COLORS, DASHES, chart, swatch } from "./charts.js";
import { badge, button, card, empty, h, link, meter, show, table } from "./dom.js";
import { inShort } from "./results.js";
import { Run } from "./runs.js";
import { ago, count, fixed, gb, percent, tail, took } from "./text.js";

// Jobs that are listed at once; runs that are compared.
const LISTED = 100;
const COMPARED = 6;
const COLUMNS = ["Compare", "Job", "Status", "Progress", "Outcome", "Created", "Ran"];
// Of a configuration, what every run has of its own.
const OWN = ["adapter_path", "resume", "overwrite"];

export default async function jobsPage(main) {
  document.title = "Jobs – mlx_segtrain";
  let chosen = new URLSearchParams(location.search).get("compare")?.split(",") ?? [];
  chosen = chosen.filter(Boolean).slice(0, COMPARED);
  const runs = new Map(); // what was chosen, each with its row and configuration
  let [rows, older, next] = [[], [], null];
  let [drawn, listed] = [null, null]; // what is shown

  const how = h("p.muted");
  const losses = chart("Losses of the chosen runs over steps", { tall: true });
  const numbers = h("div.scroll.nowrap", { tabindex: 0, role: "region",
    "aria-label": "The runs in numbers" });
  const comparison = card("Compare runs", how, losses, numbers);
  const list = h("div.scroll");
  const more = button("Older jobs", showOlder);
  main.append(h("h1", "Jobs"), comparison, card("", list, h("div.actions", more)));

  async function look() {
    const found = await api(`/api/jobs?limit=${LISTED}`);
    rows = found.jobs;
    if (!older.length) next = found.next;
    showList();
    await readChosen();
    draw();
  }

  async function showOlder() {
    const found = await api(`/api/jobs?limit=${LISTED}&before=${next}`);
    older = [...older, ...found.jobs];
    next = found.next;
    showList();
  }

  // It is made anew when other jobs are in it only: a box that has the focus keeps it.
  function showList() {
    const all = [...rows, ...older.filter((own) => !rows.some((row) => row.id === own.id))];
    const ids = all.map((row) => row.id).join();
    if (ids !== listed) {
      const none = [empty("No job yet: start one under New run."), link("New run", "/finetune")];
      const title = "All jobs, the newest first";
      show(list, all.length ? table("folds", title, COLUMNS, all.map(rowOf)) : none);
    }
    listed = ids;
    comparison.hidden = !all.some((row) => row.trains);
    more.hidden = next === null;
    for (const row of all) {
      const [status, progress, outcome, created, ran] = list.querySelectorAll(`#${row.id} .live`);
      const live = ["queued", "running"].includes(row.status);
      const share = ["failed", "cancelled"].includes(row.status) ? "–" : percent(row.progress);
      if (status.textContent !== row.status) show(status, badge(row.status));
      show(progress, live && meter(row.progress, { "aria-hidden": "true" }),
        h("span.small.muted", share));
      outcome.textContent = inShort(row);
      created.textContent = ago(row.created_at);
      ran.textContent = took(row);
    }
  }

  function rowOf({ id, title, name, trains, created_at }) {
    const onchange = (event) => choose(id, event.target.checked);
    const box = { type: "checkbox", checked: chosen.includes(id), "aria-label": `Compare ${id}` };
    return h("tr", { id },
      h("td.tight", trains && h("input", { ...box, onchange })),
      h("td.main", link(name, `/finetune/job/${id}`), h("div.muted.small", `${title} · ${id}`)),
      ["live.tight", "live.tight", "live.small"].map((kind) => h(`td.${kind}`)),
      h("td.live.tight.small.muted", { title: `${created_at} UTC` }),
      h("td.live.tight.small.muted"));
  }

  // Comparison

  function choose(id, is) {
    chosen = [...chosen.filter((own) => own !== id), ...(is ? [id] : [])].slice(-COMPARED);
    const query = chosen.length ? `?compare=${chosen.join(",")}` : "";
    history.replaceState(null, "", `/finetune/jobs${query}`);
    for (const box of list.querySelectorAll("input")) {
      box.checked = chosen.includes(box.closest("tr").id);
    }
    lookAgain();
  }

  async function readChosen() {
    for (const [id, { run }] of runs) {
      if (chosen.includes(id)) continue;
      run.stop?.();
      runs.delete(id);
    }
    for (const id of chosen) {
      if (!runs.has(id)) {
        const { job } = await api(`/api/jobs/${encodeURIComponent(id)}`).catch(() => ({}));
        if (!job?.trains) continue; // it has been deleted
        runs.set(id, { row: job, values: JSON.parse(job.config_json), run: new Run(id) });
      }
      const { row, run } = runs.get(id);
      const { status } = rows.find((own) => own.id === id) ?? row;
      // A stream is one of the few connections of a browser, and a job that waits says nothing.
      if (run.read === status || status === "queued") continue;
      run.read = status;
      run.follow();
    }
  }

  function draw() {
    const all = chosen.map((id) => runs.get(id)).filter(Boolean);
    const state = all.map(({ run }) => `${run.id} ${run.lines.length}`).join();
    if (state === drawn) return;
    drawn = state;
    how.textContent = all.length
      ? "Solid: training loss; marked: validation loss. By step."
      : `Tick up to ${COMPARED} runs below to see their losses in one chart.`;
    losses.hidden = !all.length;
    losses.draw(all.flatMap(({ row, run }, i) => {
      const name = `${i + 1}: ${tail(row.output_path)}`;
      const color = COLORS[i];
      const marks = { color, dash: DASHES[1], marked: true };
      return [
        { name, points: run.curve("train").points, color },
        { name: `${name}, validation`, points: run.curve("val").points, ...marks },
      ];
    }));
    show(numbers, all.length && inNumbers(all));
  }

  const lookAgain = every(1, look);
  every(0.5, draw);
  await lookAgain();
}

// What the runs came to, and in which parameters they differ.
function inNumbers(all) {
  const names = [...new Set(all.flatMap(({ values }) => Object.keys(values)))];
  const inWords = (name, value = "default") => {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    return name.endsWith("_dir") ? tail(text) : text;
  };
  const differ = names.filter((name) => {
    const found = new Set(all.map(({ values }) => JSON.stringify(values[name])));
    return !OWN.includes(name) && found.size > 1;
  });
  const heads = ["Step", "Training loss", "Validation loss", "Best", "Tokens/s", "Peak"];
  const rows = all.map(({ row, values, run: { train, val, step, ...run } }, i) => {
    const speed = Number.isFinite(train.tokens_per_sec) ? count(train.tokens_per_sec) : "–";
    const best = run.curves.val?.lowest;
    const told = [count(step), fixed(train.loss), fixed(val.loss), fixed(best), speed];
    return h("tr",
      h("td", swatch({ color: COLORS[i] }),
        link(`${i + 1}: ${tail(row.output_path)}`, `/finetune/job/${row.id}`)),
      differ.map((name) => h("td", inWords(name, values[name]))),
      [...told, gb(train.peak_gb)].map((value) => h("td.num", value)));
  });
  return table("", "The runs that are compared", ["Run", ...differ, ...heads], rows);
}
