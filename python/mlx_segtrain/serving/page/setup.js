// /finetune: model, data, settings, memory plan, and the start of a run.

import { api } from "./api.js";
import { copies } from "./copies.js";
import { shownReport } from "./data.js";
import { announce, button, card, combobox, empty, expansion, facts } from "./dom.js";
import { h, input, labelled, meter, notice, picker, reveal, show } from "./dom.js";
import { Form } from "./fields.js";
import { DATA_NAME, NAME, ROWS, namedAs, offer, seek, send, sendRows } from "./hub.js";
import { count, described, percent, sentence, size, tail } from "./text.js";

// Milliseconds after a change until the run is planned and the data inspected.
const PAUSE = 350;
// Maximum bytes of a data set that is inspected automatically.
const AT_ONCE = 64e6;
// Maximum bytes of a YAML file.
const MOST_YAML = 1 << 16;
// Settings that are not copied from another run.
const OWN = ["model_dir", "data_dir", "adapter_path", "resume", "overwrite"];
const PATH = /^[~/]./;

const where = (text) => (PATH.test(text) ? "a path on the server" : "on the Hugging Face hub");
const either = (name) => new RegExp(`${name.source}|${PATH.source}`);

// Example rows, if there is no data set.
const EXAMPLE = Array.from({ length: 40 }, (_, i) => {
  const [a, b] = [(7 * i + 3) % 20, (11 * i + 5) % 20];
  const messages = [{ role: "user", content: `What is ${a} plus ${b}?` },
    { role: "assistant", content: `${a} plus ${b} is ${a + b}.` }];
  return `${JSON.stringify({ messages })}\n`;
});

export default async function setup(main) {
  document.title = "New run – mlx_segtrain";
  const looking = h("p.looking.empty", "Looking for models and data sets …");
  main.append(h("h1", "New run"), looking);
  const given = new URLSearchParams(location.search);
  const origin = given.get("origin");
  let [{ models, roots }, { datasets }, schema, state, earlier] = await Promise.all([
    ...["/api/models", "/api/datasets", "/api/finetune/defaults", "/api/state"].map((x) => api(x)),
    origin && api(`/api/jobs/${encodeURIComponent(origin)}`).catch(() => null),
  ]);
  looking.remove();
  const { served, downloads, device, uploads } = state;
  const affecting = schema.fields.filter((row) => row.affects.includes("rows"));
  let asked = 0; // the number of the last plan request: answers to earlier ones are ignored
  let [inspecting, reported] = [false, null]; // `reported`: the inputs of the visible report
  let [planTimer, dataTimer] = [null, null];

  // Model

  const searched = (kind) => (downloads ? (words) => seek(kind, words) : null);
  const model = combobox(changedModel, either(NAME), where, searched("model"));
  model.offer(models.map((own) => [own.path, described(own)]));
  const modelField = labelled("Model", model, { key: "model_dir", kind: "across",
    about: "A model on this server, or a name on the Hugging Face hub: org/name." });
  const aboutModel = h("div.stack");

  function changedModel() {
    const own = models.find((one) => one.path === model.value);
    const named = !own && NAME.test(model.value ?? "") && downloads;
    modelField.complain();
    show(aboutModel, named && offer(model.value, "model", hasModel), own && facts("", [
      ["Context length", own.max_length ? `${count(own.max_length)} tokens` : "unknown"],
      ["Backend", own.fast ? "optimised" : "mlx-lm's layers"],
    ]));
    changed();
  }

  // Chooses a model after its download.
  async function hasModel(job) {
    ({ models } = await api("/api/models"));
    showMissing();
    model.offer(models.map((own) => [own.path, described(own)]));
    model.set(job.result.path);
    changedModel();
  }

  // Data

  const data = combobox(() => changedData(), either(DATA_NAME), where, searched("dataset"));
  const shortPath = (path) => (path.startsWith(`${uploads}/`) ? `uploaded: ${tail(path)}` : tail(path, 2));
  const offerData = () => data.offer(datasets.map((own) => {
    const more = own.has_valid ? "" : " · no validation file";
    return [own.path, `${shortPath(own.path)} · ${size(own.size_bytes)}${more}`];
  }));
  offerData();
  const dataField = labelled("Data set", data, { key: "data_dir", kind: "across",
    about: "The path of a folder or file of rows on this server, or a name on the hub: org/name." });
  const aboutData = h("div.stack");
  const check = button("Check the data", () => inspect());
  const report = h("div.stack", { "aria-busy": "false" });
  const moved = h("div");
  check.hidden = true;

  function changedData() {
    dataField.complain();
    const named = downloads && DATA_NAME.test(data.value ?? "");
    show(aboutData, named && offer(data.value, "dataset", async () => inspect()));
    changed();
  }

  // Uploads data; `act` returns its path.
  async function upload(act) {
    dataField.complain();
    try {
      await hasData(await act());
    } catch (error) {
      show(moved);
      dataField.complain(sentence(error.message));
      dataField.reveal();
    }
  }

  const sent = (files) => upload(() => sendRows(moved, files));
  const sentValid = ([file]) => upload(async () => {
    await send(moved, "datasets", tail(data.value), [[file, namedAs("valid", file)]]);
    return data.value; // another data set may have been chosen meanwhile
  });

  async function hasData(path) {
    ({ datasets } = await api("/api/datasets"));
    showMissing();
    offerData();
    data.set(path);
    changedData();
    reported = null;
    await inspect();
  }

  const example = () => sent([
    new File(EXAMPLE.slice(0, 32), "example-sums.jsonl"), new File(EXAMPLE.slice(32), "valid.jsonl"),
  ]);

  // Returns the inputs of a report on the data, as JSON.
  function inspection() {
    const values = form.values;
    const pairs = affecting.map(({ name }) => [name, values[name]]);
    const own = { ...Object.fromEntries(pairs), method: form.method };
    const length = own.max_seq_length; // a wrong value is reported at its field
    if (!(Number.isInteger(length) && length > 1)) delete own.max_seq_length;
    return JSON.stringify({ ...own, path: data.value, model_dir: model.value });
  }

  // Inspects the data after a pause, unless it is too large or already inspected.
  function lookAtData() {
    clearTimeout(dataTimer);
    if (data.value === null) {
      reported = null;
      check.hidden = true;
      return show(report);
    }
    if (reported === inspection()) return;
    const known = datasets.find((own) => own.path === data.value);
    check.hidden = !known || known.size_bytes < AT_ONCE;
    if (!check.hidden) {
      if (reported !== null) show(report, notice("Settings changed; check the data again."));
      reported = null;
      return;
    }
    dataTimer = setTimeout(inspect, PAUSE);
  }

  async function inspect() {
    clearTimeout(dataTimer);
    if (inspecting || data.value === null) return; // a running inspection starts the next one
    [inspecting, reported] = [true, inspection()];
    check.disabled = true;
    report.setAttribute("aria-busy", "true");
    if (!report.childElementCount) show(report, empty("Checking the data …"));
    try {
      const found = await api("/api/finetune/inspect-dataset", JSON.parse(reported));
      if (reported !== inspection()) return;
      dataField.complain(!found.ok && wrongData(found));
      const lacks = model.value === null && "Choose a model to see lengths and tokens.";
      const mine = found.ok && data.value?.startsWith(`${uploads}/`) && !found.n_valid;
      show(report, found.ok && [lacks && notice(lacks), shownReport(found)],
        mine && h("div.actions", picker("Add validation rows", sentValid, { accept: ROWS })));
      announce(found.ok ? `${count(found.n_train)} training rows.` : found.error);
    } catch (error) {
      show(report);
      // The plan reports an error in a setting at its field.
      const elsewhere = form.fields[error.field];
      if (reported === inspection()) dataField.complain(!elsewhere && sentence(error.message));
    } finally {
      inspecting = false;
      check.disabled = false;
      report.setAttribute("aria-busy", "false");
      if (data.value === null || reported !== inspection()) lookAtData();
    }
  }

  // The error in the data, and a button that may fix it.
  function wrongData({ error }) {
    const asked = /use method (\w+)/.exec(error ?? "")?.[1];
    return [sentence(error ?? "the data cannot be read"), asked && button(`Use method ${asked}`, () => {
      form.put({ method: asked });
      changed();
    }, "small")];
  }

  // Plan and start

  const form = new Form(schema, changed);
  const loaded = h("div.stack", { role: "status" });
  const verdict = h("div.stack");
  const problem = h("div", { role: "alert" });
  const name = input("optional", { maxlength: 120 });
  const ranks = input("1", { type: "number", min: 1, max: state.ranks, oninput: changed });
  const ranksField = labelled("Processes", ranks, { key: "ranks",
    about: `Up to ${state.ranks}. "Parallelism" sets how the processes share the work.` });
  const start = button("Start training", null, "primary.wide");

  function changed() {
    show(problem);
    lookAtData();
    clearTimeout(planTimer);
    planTimer = setTimeout(plan, PAUSE);
  }

  // Shows an error at the field that caused it; returns this field, if there is one.
  function complain(fault) {
    const own = { model_dir: modelField, data_dir: dataField, ranks: ranksField }[fault?.field];
    modelField.complain(own === modelField && sentence(fault.message));
    ranksField.complain(own === ranksField && sentence(fault.message));
    if (own === dataField) dataField.complain(sentence(fault.message));
    return form.complain(fault) ?? own;
  }

  // Fills in the form from a file for `train --config`, and shows the errors in the file at the fields.
  async function loadSettings([file]) {
    show(loaded);
    try {
      if (file.size > MOST_YAML) throw new Error("it is too large for a settings file");
      const { values: own, faults } = await api("/api/finetune/read", { yaml: await file.text() });
      const rest = Object.fromEntries(Object.entries(own).filter(([name]) => !OWN.includes(name)));
      form.fill(rest, faults);
      if (own.model_dir != null) model.set(own.model_dir);
      if (own.data_dir != null) data.set(own.data_dir);
      const lost = ["model_dir", "data_dir"].filter((name, i) =>
        own[name] != null && [model, data][i].value === null);
      const left = OWN.filter((name) => own[name] != null && !name.endsWith("_dir"));
      const others = faults.filter(({ field }) => !form.fields[field]);
      const said = [
        ...others.map(({ message }) => message),
        ...lost.map((name) => `${name} is ${own[name]}, which is not an absolute path on this server: set it above`),
      ];
      show(loaded, notice(`${file.name} is loaded${left.length ? `, without ${left.join(" and ")}, which each run sets separately` : ""}.`, "good"),
        said.map((text) => notice(sentence(text), "warn")));
      changedModel();
      changedData();
      const wrong = faults.map(({ field }) => form.fields[field]).find(Boolean);
      if (wrong) wrong.reveal();
    } catch (error) {
      show(loaded, notice(sentence(`${file.name}: ${error.message}`), "bad"));
    }
  }

  const values = () => ({
    ...form.values,
    ...(ranks.value && { ranks: Number(ranks.value) }),
    model_dir: model.value,
    data_dir: data.value,
  });

  async function plan() {
    const own = ++asked;
    let [found, fault] = [null, null];
    if (model.value !== null) {
      const { data_dir, ...rest } = values();
      found = await api("/api/finetune/plan", rest).catch((error) => ((fault = error), null));
    }
    if (own !== asked) return;
    const place = complain(fault);
    if (found) show(verdict, shownPlan(found));
    else if (place) {
      show(verdict, notice(["One setting has to be changed: ",
        h("button.inline", { type: "button", onclick: () => place.reveal() }, "show it")], "bad"));
    } else if (fault) show(verdict, notice(sentence(fault.message), "bad"));
    else show(verdict, empty("Choose a model to see whether a run fits on this machine."));
    announce(found?.message ?? fault?.message ?? "");
  }

  async function submit(event) {
    event.preventDefault();
    if (start.disabled) return; // Enter was pressed twice
    show(problem);
    const lacks = (own, message) => {
      own.complain(message);
      own.reveal();
      announce(message);
    };
    if (!model.value) return lacks(modelField, "Choose a model first.");
    if (!data.value) return lacks(dataField, "Choose a data set first.");
    start.disabled = true;
    try {
      const { data_dir, ...rest } = values();
      await api("/api/finetune/plan", rest); // otherwise the job would fail later
      const { job_id } = await api("/api/finetune/submit", values());
      const label = name.value.trim();
      if (label) await api(`/api/jobs/${job_id}`, { label }, { method: "PATCH" });
      location.assign(`/finetune/job/${job_id}`);
    } catch (error) {
      start.disabled = false;
      const place = complain(error);
      announce(error.message);
      if (place) return place.reveal();
      show(problem, notice(sentence(error.message), "bad"));
      reveal(problem, start);
    }
  }

  const below = roots.join(" or ");
  const noModel = `No model found below ${below}. Put the folder of an MLX model there, start the ` +
    `server with its path, or ${downloads ? "give a name on the Hugging Face hub"
      : "start it with --allow-downloads to download one from the Hugging Face hub"}.`;
  const small = "mlx-community/SmolLM2-135M-Instruct";
  const noData = "No data set found. Upload a file of rows (JSON lines, CSV, Parquet, …), or start " +
    "with a few example rows.";
  const tiny = () => {
    model.set(small);
    changedModel();
  };
  // Hints, which are visible while there are no models or data sets.
  const noModels = h("div", empty(noModel, downloads && button("Use a small model from the hub", tiny)));
  const noRows = h("p.empty", noData);
  const makeRows = button("Create example rows", example);
  function showMissing() {
    noModels.hidden = models.length > 0;
    noRows.hidden = makeRows.hidden = datasets.length > 0;
  }
  showMissing();
  main.append(
    h("form.two", { novalidate: true, onsubmit: submit },
      h("div.stack",
        card("Model and data",
          modelField.element,
          noModels,
          aboutModel,
          dataField.element,
          noRows,
          h("div.actions",
            picker("Upload rows", sent, { accept: ROWS, several: true }),
            makeRows, check),
          moved, aboutData, report),
        card("Settings",
          h("div.actions", picker("Load YAML", loadSettings, { accept: ".yaml,.yml" })), loaded,
          form.element)),
      h("div.stack.stick", card("Plan", verdict,
        h("p.small.muted", `${device.name}: ${size(device.free_bytes)} of `,
          `${size(device.memory_bytes)} free for a run`)),
      card("Start", labelled("Name of the run", name).element, state.ranks > 1 && ranksField.element,
        problem, start, copies(values)))));

  // Initial values: from an earlier run or the address, or the only model.
  const only = (all) => (all.length === 1 ? all[0].path : null);
  if (earlier?.job.trains) {
    const own = JSON.parse(earlier.job.config_json);
    model.set(own.model_dir);
    data.set(own.data_dir);
    const { error, fault_field: field } = earlier.job;
    OWN.forEach((key) => delete own[key]);
    if (own.ranks <= state.ranks) ranks.value = own.ranks;
    form.put(own);
    if (given.get("less") !== null) lessMemory(own);
    changedModel();
    changedData();
    clearTimeout(planTimer);
    await plan();
    if (field) complain({ message: error, field })?.reveal();
    return;
  }
  model.set(given.get("model") ?? served?.path ?? only(models));
  data.set(given.get("data"));
  changedModel();
  if (data.value !== null) changedData();
  clearTimeout(planTimer);
  await plan();

  // Halves the batch size or, if it is 1, the context length.
  function lessMemory(own) {
    const standard = (key) => Number(own[key] ?? schema.fields.find((x) => x.name === key).default);
    const key = standard("batch_size") > 1 ? "batch_size" : "max_seq_length";
    form.put({ [key]: Math.floor(standard(key) / 2) });
  }
}

function shownPlan({ fits, message, plan }) {
  const said = fits ? message.replace("fits", "Fits") : sentence(message);
  const head = notice(said, fits ? "good" : "warn");
  if (!plan?.predicted) return head;
  const share = plan.peak / plan.budget;
  const words = `${percent(share)} of the budget`;
  const parts = Object.entries(plan.parts).sort(([, a], [, b]) => b - a);
  const told = [
    ["Batch", `${count(plan.rows)} × ${count(plan.tokens)} tokens`],
    plan.recomputed && ["Recomputed", percent(plan.recomputed)],
    ...parts.map(([name, bytes]) => [name, size(bytes)]),
  ];
  return [
    head,
    meter(share, { role: "img", "aria-label": words }),
    expansion("Where the memory goes", plan.plan, facts("lines", told.filter(Boolean))),
  ];
}
