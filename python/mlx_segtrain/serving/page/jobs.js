// /finetune/jobs: all jobs, and the losses of several runs in one chart.

import { api, every } from "./api.js";
import { COLORS, DASHES, chart, swatch } from "./charts.js";
import { badge, button, card, empty, h, link, meter, show } from "./dom.js";
import { inShort } from "./results.js";
import { Run } from "./runs.js";
import { ago, count, fixed, gb, percent, tail, took } from "./text.js";

// Jobs on a page; runs that are compared at once.
const PAGE = 100;
const COMPARED = 6;
// Of a configuration, what every run has of its own.
const OWN = ["adapter_path", "resume", "overwrite"];

export default async function jobsPage(main) {
  document.title = "Jobs – mlx_segtrain";
  const runs = new Map(); // of the rows that were chosen: the row with its configuration, its Run
  let chosen = new URLSearchParams(location.search).get("compare")?.split(",") ?? [];
  chosen = chosen.filter(Boolean).slice(0, COMPARED);
  let [rows, older, next, drawn, listed] = [[], [], null, "", ""];

  const how = h("p.muted");
  const losses = chart("Losses of the chosen runs over steps", { tall: true });
  const table = h("div.scroll.nowrap", {
    ...{ tabindex: 0, role: "region", "aria-label": "The runs in numbers" },
  });
  const comparison = card("Compare runs", how, losses, table);
  const list = h("div.scroll");
  const more = button("Older jobs", showOlder);
  comparison.hidden = true;
  main.append(h("h1", "Jobs"), comparison, card("", list, h("div.actions", more)));

  async function look() {
    const found = await api(`/api/jobs?limit=${PAGE}`);
    rows = found.jobs;
    if (!older.length) next = found.next;
    showList();
    await compare();
  }

  async function showOlder() {
    const found = await api(`/api/jobs?limit=${PAGE}&before=${next}`);
    older = [...older, ...found.jobs];
    next = found.next;
    showList();
  }

  // The list is made anew when other jobs are in it: else a box would lose the focus.
  function showList() {
    const known = new Set(rows.map((row) => row.id));
    const all = [...rows, ...older.filter((row) => !known.has(row.id))];
    const ids = all.map((row) => row.id).join();
    comparison.hidden = !all.some((row) => row.trains);
    more.hidden = next === null;
    if (ids !== listed || !list.firstChild) {
      listed = ids;
      show(list, all.length ? made(all) : [empty("No job yet: start one under New run."), link("New run", "/finetune")]);
    }
    for (const row of all) {
      const state = JSON.stringify([row.status, row.progress, row.message, row.error]);
      const [status, progress, outcome, created, ran] = list.querySelectorAll(`#${row.id} td.live`);
      const live = ["queued", "running"].includes(row.status);
      const broken = ["failed", "cancelled"].includes(row.status);
      created.textContent = ago(row.created_at);
      ran.textContent = took(row);
      if (status.dataset.state === state) continue;
      status.dataset.state = state;
      show(status, badge(row.status));
      const share = h("span.small.muted", broken ? "–" : percent(row.progress));
      show(progress, live && meter(row.progress, { "aria-hidden": "true" }), share);
      outcome.textContent = inShort(row);
    }
  }

  function made(all) {
    const names = ["Compare", "Job", "Status", "Progress", "Outcome", "Created", "Ran"];
    const body = all.map((row) => {
      const box = h("input", {
        ...{ type: "checkbox", checked: chosen.includes(row.id), "aria-label": `Compare ${row.id}` },
        onchange: () => choose(row.id, box.checked),
      });
      return h(
        "tr",
        { id: row.id },
        h("td.tight", row.trains && box),
        h(
          "td.main",
          link(row.name, `/finetune/job/${row.id}`),
          h("div.muted.small", `${row.title} · ${row.id}`),
        ),
        h("td.live.tight"),
        h("td.live.tight"),
        h("td.live.small"),
        h("td.live.tight.small.muted", { title: `${row.created_at} UTC` }),
        h("td.live.tight.small.muted"),
      );
    });
    return rowsOf("All jobs, the newest first", names, body, "folds");
  }

  // Comparison

  function choose(id, is) {
    chosen = [...chosen.filter((own) => own !== id), ...(is ? [id] : [])].slice(-COMPARED);
    const address = chosen.length ? `/finetune/jobs?compare=${chosen.join(",")}` : "/finetune/jobs";
    history.replaceState(null, "", address);
    for (const box of list.querySelectorAll("input")) {
      box.checked = chosen.includes(box.closest("tr").id);
    }
    lookAgain();
  }

  async function compare() {
    for (const [id, { run }] of runs) {
      if (chosen.includes(id)) continue;
      run.stop?.();
      runs.delete(id);
    }
    for (const id of chosen) {
      if (!runs.has(id)) {
        const found = await api(`/api/jobs/${encodeURIComponent(id)}`).catch(() => null);
        if (!found?.job.trains) {
          chosen = chosen.filter((own) => own !== id); // it has been deleted
          continue;
        }
        runs.set(id, { row: found.job, values: JSON.parse(found.job.config_json), run: new Run(id) });
      }
      const { run } = runs.get(id);
      const status = rows.find((row) => row.id === id)?.status ?? "done";
      // A stream takes one of the browser's few connections, and a job that waits says nothing.
      if (run.read !== status && status !== "queued") {
        run.read = status;
        run.follow();
      }
    }
    draw();
  }

  function draw() {
    const all = chosen.map((id) => runs.get(id)).filter(Boolean);
    how.textContent = all.length
      ? "Solid: training loss; marked: validation loss. By step."
      : `Tick up to ${COMPARED} runs below to see their losses in one chart.`;
    const state = all.map(({ run }) => `${run.id} ${run.count}`).join();
    if (state === drawn && drawn) return;
    drawn = state;
    losses.hidden = !all.length;
    const lines = all.flatMap(({ row, run }, i) => {
      const name = `${i + 1}: ${tail(row.output_path)}`;
      const color = COLORS[i];
      const val = { points: run.curve("val").points, color, dash: DASHES[1], marked: true };
      return [
        { name, points: run.curve("train").points, color },
        { name: `${name}, validation`, ...val },
      ];
    });
    losses.draw(lines);
    show(table, all.length ? inNumbers(all) : null);
  }

  const lookAgain = every(1, look);
  await lookAgain();
  every(0.5, draw);
}

const rowsOf = (caption, names, body, classes = "") =>
  h(
    `table.list.${classes}`,
    h("caption.sr-only", caption),
    h("thead", h("tr", names.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", body),
  );

// What the runs came to, and in which parameters they differ.
function inNumbers(all) {
  const names = [...new Set(all.flatMap(({ values }) => Object.keys(values)))];
  const differ = names.filter((name) => {
    const found = new Set(all.map(({ values }) => JSON.stringify(values[name])));
    return !OWN.includes(name) && found.size > 1;
  });
  const inWords = (name, value = "default") =>
    name.endsWith("_dir") ? tail(value) : typeof value === "string" ? value : JSON.stringify(value);
  const heads = ["Step", "Training loss", "Validation loss", "Best", "Tokens/s", "Peak"];
  const body = all.map(({ row, values, run }, i) => {
    const { train, val } = run;
    const speed = Number.isFinite(train.tokens_per_sec) ? count(train.tokens_per_sec) : "–";
    const told = [
      ...[count(run.step), fixed(train.loss), fixed(val.loss)],
      ...[fixed(run.curve("val").lowest), speed, gb(train.peak_gb)],
    ];
    return h(
      "tr",
      h(
        "td",
        swatch({ color: COLORS[i] }),
        link(`${i + 1}: ${tail(row.output_path)}`, `/finetune/job/${row.id}`),
      ),
      differ.map((name) => h("td", inWords(name, values[name]))),
      told.map((value) => h("td.num", value)),
    );
  });
  return rowsOf("The runs that are compared", ["Run", ...differ, ...heads], body);
}
