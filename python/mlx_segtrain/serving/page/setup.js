// /finetune: model, data, parameters; whether it fits; and the start of a run.

import { api, follow } from "./api.js";
import { shownReport } from "./data.js";
import { announce, button, card, combobox, empty, expansion, facts, field } from "./dom.js";
import { h, input, meter, notice, show } from "./dom.js";
import { Form } from "./fields.js";
import { count, many, percent, sentence, size, tail } from "./text.js";

// Milliseconds without a change after which the planner is asked.
const PAUSE = 350;
// What a run has of its own: another like it does not.
const OWN = ["model_dir", "data_dir", "adapter_path", "resume", "overwrite"];

// A name of the hub, with or without a revision; of a data set with a configuration and a split.
const NAME = /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$/;

const DATA_NAME =
  /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(\/[\w.+-]+)?(:[\w.-]+)?$/;

const bitsOf = (model) => (model.bits ? `${model.bits} bits` : "not quantized");

// A model in a list to choose from.
export const described = (model) =>
  [model.id, model.family, many(model.parameters), bitsOf(model), size(model.size_bytes)]
    .join(" · ");

export default async function setup(main) {
  document.title = "New run – mlx_segtrain";
  const looking = h("p.looking.empty", "Looking for models and data sets …");
  main.append(h("h1", "New run"), looking);
  const origin = new URLSearchParams(location.search).get("origin");
  let [{ models, roots }, { datasets }, schema, state, earlier] = await Promise.all([
    ...["/api/models", "/api/datasets", "/api/finetune/defaults", "/api/state"].map((x) => api(x)),
    origin && api(`/api/jobs/${encodeURIComponent(origin)}`).catch(() => null),
  ]);
  looking.remove();
  const { served, downloads } = state;
  const inspected = schema.fields.filter((row) => row.affects.includes("rows"));
  let asked = 0; // the last question to the planner: earlier answers are late
  let reported = null; // what the report that is shown is of
  let timer = null;

  // Model and data

  const model = combobox(changedModel, NAME, "on the Hugging Face hub");
  model.offer(models.map((own) => [own.path, described(own)]));
  const aboutModel = h("div.stack");
  const data = combobox(() => chosen(data));
  data.offer(datasets.map((own) => {
    const more = own.has_valid ? "" : " · no valid.jsonl";
    return [own.path, `${tail(own.path, 2)} · ${size(own.size_bytes)}${more}`];
  }));
  const path = input("/path/to/folder", { oninput: () => chosen(path) });
  const aboutData = h("div");
  const place = () => path.value.trim() || data.value || "";
  const look = button("Inspect data", inspect);
  const report = h("div.stack");

  // A folder is chosen or typed: the last of both counts.
  function chosen(own) {
    if (own === data && data.value) path.value = "";
    if (own === path && path.value) data.set(null);
    const named = downloads && DATA_NAME.test(path.value.trim());
    show(aboutData, named && offer(path.value.trim(), "dataset", () => {}));
    outdate();
  }

  function changedModel() {
    const own = models.find((one) => one.path === model.value);
    const named = !own && model.value !== null && downloads;
    show(aboutModel, named && offer(model.value, "model", hasModel), own && facts("", [
      ["Family", own.family],
      ["Weights", bitsOf(own)],
      ["Parameters", many(own.parameters)],
      ["Size on disk", size(own.size_bytes)],
      ...(own.max_length ? [["Made for up to", `${count(own.max_length)} tokens`]] : []),
      ["Computed by", own.fast ? "our own ops" : "mlx-lm's layers"],
    ]));
    changed();
  }

  // A button that brings what is named on the hub by a job, and shows how far that is; `ended` gets
  // the job, or null.
  function offer(name, kind, ended) {
    const place = h("div.stack");
    const more = h("span.muted.small", "If it is not on this machine yet.");
    show(place, h("div.actions", button("Download", bring), more));
    async function bring() {
      let failure = null;
      const tell = (event) => {
        if (event.type === "failed" || event.type === "cancelled") failure = event;
        if (event.share === undefined) return;
        const bar = meter(event.share, { role: "img", "aria-label": percent(event.share) });
        show(place, bar, h("p.small.muted", event.message));
      };
      show(problem);
      show(place, empty(`Asking the hub for ${name}.`));
      announce(`Downloading ${name}.`);
      try {
        const { job_id } = await api("/api/hub/download", { name, kind });
        await new Promise((end) => follow(job_id, 0, tell, end));
        const { job } = await api(`/api/jobs/${job_id}`);
        if (job.status === "done") show(place, h("p.small.muted", `${name} is on this machine.`));
        if (place.isConnected) await ended(job.status === "done" ? job : null);
      } catch (error) {
        failure = { error: error.message };
      }
      if (failure) show(place, h("div.actions", button("Download", bring), more));
      if (failure && place.isConnected) complain(failure.error ?? failure.message);
      announce(failure?.error ?? `${name} is downloaded.`);
    }
    return place;
  }

  // A model that has come is one of those on disk.
  async function hasModel(job) {
    if (job === null) return;
    ({ models } = await api("/api/models"));
    model.offer(models.map((own) => [own.path, described(own)]));
    model.set(job.result.path);
    changedModel();
  }

  // What a report on the data depends on.
  function inspection() {
    const given = form.values;
    const pairs = inspected.map(({ name }) => [name, given[name]]);
    const values = { method: form.method, ...Object.fromEntries(pairs) };
    const length = values.max_seq_length; // what is wrong with it stands there
    if (!(Number.isInteger(length) && length > 1)) delete values.max_seq_length;
    return JSON.stringify({ ...values, path: place(), model_dir: model.value });
  }

  function outdate() {
    if (reported === null || reported === inspection()) return;
    reported = null;
    show(report, notice("Something has changed since: inspect the data again."));
  }

  async function inspect() {
    show(problem);
    if (!place()) return complain("Choose a data set, or give its path, to inspect it.");
    reported = inspection();
    look.disabled = true;
    show(report, empty("Inspecting the data."));
    announce("Inspecting the data.");
    try {
      const found = await api("/api/finetune/inspect-dataset", JSON.parse(reported));
      const lacks = model.value === null && "Choose a model to see lengths and tokens.";
      show(report, lacks && notice(lacks), shownReport(found));
      announce(found.ok ? `${count(found.n_train)} rows to train.` : found.error);
      outdate();
    } catch (error) {
      show(report);
      complain(error.message);
    } finally {
      look.disabled = false;
    }
  }

  // Plan and start

  const form = new Form(schema, changed);
  const verdict = h("div.stack");
  const problem = h("div", { role: "alert" });
  const start = button("Start training", null, "primary.wide");
  const complain = (message) => show(problem, notice(sentence(message), "bad"));

  function changed() {
    outdate();
    clearTimeout(timer);
    timer = setTimeout(plan, PAUSE);
  }

  async function plan() {
    const own = ++asked;
    let [found, fault] = [null, null];
    if (model.value !== null) {
      const values = { ...form.values, model_dir: model.value };
      found = await api("/api/finetune/plan", values).catch((error) => ((fault = error), null));
    }
    if (own !== asked) return;
    form.complain(fault);
    if (found) show(verdict, shownPlan(found));
    else if (fault) show(verdict, notice(sentence(fault.message), "bad"));
    else show(verdict, empty("Choose a model to see whether a run fits this machine."));
    announce(found?.message ?? fault?.message ?? "");
  }

  async function submit(event) {
    event.preventDefault();
    if (start.disabled) return; // Enter was pressed twice
    show(problem);
    if (!model.value) return complain("Choose a model first.");
    if (!place()) return complain("Choose a data set first.");
    const values = { ...form.values, model_dir: model.value, data_dir: place() };
    start.disabled = true;
    try {
      await api("/api/finetune/plan", values); // or the run would find out, a while later
      const { job_id } = await api("/api/finetune/submit", values);
      location.assign(`/finetune/job/${job_id}`);
    } catch (error) {
      start.disabled = false;
      form.complain(error);
      complain(error.message);
    }
  }

  const below = roots.join(" or ");
  const noModel = `No model found below ${below}: put the folder of an MLX model there, start the ` +
    "server with its path, or give a name of the Hugging Face hub.";
  const noData = `No data set found below ${below}: put train.jsonl (and valid.jsonl) into a ` +
    "folder there, or give a path.";
  const known = "One that was found on disk, or a name of the Hugging Face hub, as org/name.";
  const found = "Folders with train.jsonl, found on disk.";
  const typed = "A folder or a file with rows, or a name of the Hugging Face hub.";
  main.append(
    h("form.two", { novalidate: true, onsubmit: submit },
      h("div.stack",
        card("Model and data",
          field("Model", model, { about: known, key: "model_dir", kind: "across" }),
          !models.length && empty(noModel), aboutModel,
          h("div.fields.halves", field("Data set", data, { about: found, key: "data_dir" }),
            field("or its path", path, { about: typed })),
          aboutData,
          !datasets.length && empty(noData),
          h("div.actions", look,
            h("span.muted.small", "Counts, lengths, and what of the first rows is trained.")),
          report),
        card("Parameters", form.blocks)),
      h("div.stack.stick", card("Plan", verdict, problem, start))));

  // With the values of an earlier run, or with what there is only one of.
  if (earlier?.job.trains) {
    const values = JSON.parse(earlier.job.config_json);
    model.set(values.model_dir);
    data.set(values.data_dir);
    if (data.value === null) path.value = values.data_dir;
    OWN.forEach((name) => delete values[name]);
    form.put(values);
  } else {
    model.set(served?.path ?? (models.length === 1 ? models[0].path : null));
  }
  changedModel();
  clearTimeout(timer);
  await plan();
}

function shownPlan({ fits, message, plan }) {
  const said = fits ? message.replace("fits", "Fits") : sentence(message);
  const head = notice(said, fits ? "good" : "warn");
  if (!plan?.predicted) return head;
  const share = plan.peak / plan.budget;
  const words = `${percent(share)} of the budget`;
  const parts = Object.entries(plan.parts).sort(([, a], [, b]) => b - a);
  const told = [
    ["Peak", `${size(plan.peak)}, ${words}`],
    ["Budget", size(plan.budget)],
    ["Longest row that fits", `${count(plan.longest)} tokens`],
    plan.max_length && ["Model made for", `${count(plan.max_length)} tokens`],
    ["Batch", `${count(plan.rows)} × ${count(plan.tokens)} tokens`],
    plan.recomputed && ["Computed twice", percent(plan.recomputed)],
  ];
  return [
    head,
    meter(share, { role: "img", "aria-label": words }),
    facts("lines", told.filter(Boolean)),
    expansion("Where the memory goes", "",
      facts("lines", parts.map(([name, bytes]) => [name, size(bytes)]))),
    h("p.small.muted.wrap", `Plan: ${plan.plan}`),
  ];
}
