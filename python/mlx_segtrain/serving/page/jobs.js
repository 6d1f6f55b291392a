// /finetune/jobs: the list of jobs, and a comparison of runs.

import { api, every } from "./api.js";
import { COLORS, DASHES, chart, swatch } from "./charts.js";
import { attempt, badge, button, card, empty, field, h, input, link, meter, show, table } from "./dom.js";
import { standardOf } from "./fields.js";
import { broken, ended, inShort, judged } from "./results.js";
import { Run } from "./runs.js";
import { ago, count, fixed, gb, percent, save, tail, took } from "./text.js";

// The number of jobs per page, and the maximum number of runs in a comparison.
const LISTED = 100;
const COMPARED = 6;
const COLUMNS = ["Compare", "Job", "Status", "Progress", "Outcome", "Created", "Ran"];
// Settings that are not compared.
const OWN = ["adapter_path", "resume", "overwrite"];
// Results of runs: title, value, format and, for a loss or a reward, its name.
const FIGURES = [
  ["Steps", ({ run }) => run.step, count],
  ...["loss", "reward"].flatMap((name) => {
    const own = ({ run }, value) => (run.measure === name ? value() : undefined);
    return [
      [`Training ${name}`, (one) => own(one, () => one.run.train[name]), fixed, name],
      [`Validation ${name}`, (one) => own(one, () => one.run.val[name]), fixed, name],
      [`Best validation ${name}`, (one) => own(one, () => one.run.best), fixed, name],
    ];
  }),
  ["Tokens/s", ({ run }) => run.train.tokens_per_sec, (n) => (Number.isFinite(n) ? count(n) : "–")],
  ["Peak memory", ({ run }) => run.train.peak_gb, gb],
];

export default async function jobsPage(main) {
  document.title = "Jobs – mlx_segtrain";
  const given = new URLSearchParams(location.search);
  let chosen = given.get("compare")?.split(",") ?? [];
  chosen = chosen.filter(Boolean).slice(0, COMPARED);
  const schema = await api("/api/finetune/defaults");
  const runs = new Map(); // the chosen runs by id, with their rows and configurations
  let [rows, older, next] = [[], [], null];
  let [drawn, listed] = [null, null]; // the states that are shown

  const how = h("p.muted");
  const losses = chart("Losses of the chosen runs", { tall: true });
  const numbers = h("div.scroll.nowrap", { tabindex: 0, role: "region",
    "aria-label": "The runs in numbers" });
  const saved = button("Save as CSV", () => save("runs.csv", asTable()), "small");
  const comparison = card("Compare runs", how, losses, numbers, h("div.actions", saved));
  const find = input("name, tag, status or id", { type: "search", oninput: filter });
  const list = h("div.scroll", { tabindex: 0, role: "region", "aria-label": "List of jobs" });
  const none = h("p.empty", { hidden: true }, "No job contains all of these words.");
  const more = button("Older jobs", () => attempt(problem, showOlder));
  const problem = h("div", { role: "alert" });
  find.value = given.get("find") ?? "";
  main.append(h("h1", "Jobs"), comparison,
    card("", field("Find", find), list, none, problem, h("div.actions", more)));

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

  const all = () => [...rows, ...older.filter((own) => !rows.some((row) => row.id === own.id))];

  // Rebuilds the list only if its jobs have changed, so that a checkbox keeps the focus.
  function showList() {
    const ids = all().map((row) => [row.id, row.name, row.tags].join()).join();
    if (ids !== listed) {
      const start = h("a.button.primary", { href: "/finetune" }, "New run");
      const title = "All jobs, newest first";
      show(list, all().length ? table("folds", title, COLUMNS, all().map(rowOf))
        : empty("No jobs yet.", start));
    }
    listed = ids;
    find.closest(".field").hidden = !all().length;
    comparison.hidden = !all().some((row) => row.trains);
    more.hidden = next === null;
    for (const row of all()) {
      const [status, progress, outcome, created, ran] = list.querySelectorAll(`#${row.id} .live`);
      const share = broken(row) ? "–" : percent(row.progress);
      if (status.textContent !== row.status) show(status, badge(row.status));
      show(progress, !ended(row) && meter(row.progress, { "aria-hidden": "true" }),
        h("span.small.muted", share));
      outcome.textContent = inShort(row);
      created.textContent = ago(row.created_at);
      ran.textContent = took(row);
    }
    filter();
  }

  // Shows the rows that contain all typed words.
  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let seen = 0;
    for (const { id, name, tags, status, title, note } of all()) {
      const text = [id, name, status, title, note, ...tags].join(" ").toLowerCase();
      const has = words.every((word) => text.includes(word));
      document.getElementById(id).hidden = !has;
      seen += has;
    }
    none.hidden = seen > 0 || !all().length;
  }

  function rowOf({ id, title, name, trains, tags, created_at }) {
    const onchange = (event) => choose(id, event.target.checked);
    const box = { type: "checkbox", checked: chosen.includes(id), "aria-label": `Compare ${id}` };
    return h("tr", { id },
      h("td.tight", trains && h("input", { ...box, onchange })),
      h("td.main", link(name, `/finetune/job/${id}`), tags.map((tag) => h("span.tag", tag)),
        h("div.muted.small", `${title} · ${id}`)),
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
        runs.set(id, { row: job, values: JSON.parse(job.config_json), run: new Run(id, judged(job)) });
      }
      const { row, run } = runs.get(id);
      const { status } = rows.find((own) => own.id === id) ?? row;
      // A waiting job has no events, and a browser allows only a few connections to a server.
      if (run.read === status || status === "queued") continue;
      run.read = status;
      run.follow();
    }
  }

  const titleOf = ({ row }, i) => `${i + 1}: ${row.label || tail(row.output_path)}`;
  const compared = () => chosen.map((id) => runs.get(id)).filter(Boolean);

  function draw() {
    const own = compared();
    const state = own.map(({ run }) => `${run.id} ${run.place}`).join();
    if (state === drawn) return;
    drawn = state;
    how.textContent = own.length
      ? "Solid: training; dashed: validation."
      : `Tick up to ${COMPARED} runs below to see their losses in one chart.`;
    losses.hidden = saved.hidden = !own.length;
    losses.draw(own.flatMap((one, i) => {
      const [name, color] = [titleOf(one, i), COLORS[i]];
      const marks = { color, dash: DASHES[1], marked: true };
      return [
        { name, points: one.run.curve("train").points, color },
        { name: `${name}, validation`, points: one.run.curve("val").points, ...marks },
      ];
    }), { legend: true, axis: axisOf(own) });
    show(numbers, own.length && inNumbers(own));
  }

  // Returns the title of the vertical axis, with all units, since runs of different methods share one chart.
  function axisOf(own) {
    const all = own.map(({ row, run }) => (row.rewarded ? run.measure : `loss, ${row.loss_unit}`));
    return [...new Set(all)].join(" · ");
  }

  // Returns the settings in which runs differ, and a function that returns their values or defaults.
  function differences(own) {
    const known = Object.fromEntries(schema.fields.map((row) => [row.name, row]));
    const valueOf = ({ values }, name) => {
      const value = values[name];
      const other = (own) => values[own] ?? known[own].default;
      if (value == null) return known[name] ? standardOf(known[name], other) : "–";
      const text = Array.isArray(value) ? value.join(", ")
        : typeof value === "string" ? value : JSON.stringify(value);
      return name.endsWith("_dir") ? tail(text) : text;
    };
    const names = [...new Set(own.flatMap(({ values }) => Object.keys(values)))];
    const differ = names.filter((name) =>
      !OWN.includes(name) && new Set(own.map((one) => valueOf(one, name))).size > 1);
    return [differ, valueOf];
  }

  // The results of the runs, and their differences from the first run.
  function inNumbers(own) {
    const [differ, valueOf] = differences(own);
    const figures = figuresOf(own);
    const rows = own.map((one, i) => h("tr",
      h("td", swatch({ color: COLORS[i] }), link(titleOf(one, i), `/finetune/job/${one.row.id}`)),
      differ.map((name) => h("td", valueOf(one, name))),
      figures.map(([, valueOf, said, measure]) => {
        const [first, value] = [valueOf(own[0]), valueOf(one)];
        const both = i > 0 && first != null && value != null;
        return h("td.num", said(value), both && delta(value - first, said, measure));
      })));
    return table("", "The runs that are compared", ["Run", ...differ, ...figures.map(([x]) => x)], rows);
  }

  // The results that at least one of the runs has.
  const figuresOf = (own) => FIGURES.filter(([, , , measure]) =>
    !measure || own.some(({ run }) => run.measure === measure));

  function delta(change, said, measure) {
    if (!Number.isFinite(change) || change === 0) return null;
    const kind = measure ? ((change < 0) === (measure === "loss") ? "better" : "worse") : "muted";
    return h(`div.small.${kind}`, `${change < 0 ? "−" : "+"}${said(Math.abs(change))}`);
  }

  function asTable() {
    const own = compared();
    const [differ, valueOf] = differences(own);
    const figures = figuresOf(own);
    return [["job", "run", ...differ, ...figures.map(([title]) => title.toLowerCase())],
      ...own.map((one, i) => [one.row.id, titleOf(one, i).replace(/^\d+: /, ""),
        ...differ.map((name) => valueOf(one, name)), ...figures.map(([, valueOf]) => valueOf(one))])];
  }

  const lookAgain = every(1, look);
  every(0.5, draw);
  await lookAgain();
}
