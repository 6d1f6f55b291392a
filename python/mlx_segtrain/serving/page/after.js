// The actions for an adapter: evaluate, merge, export, push. Each of them is a job.

import { api, every } from "./api.js";
import { announce, attempt, badge, button, combobox, empty, expansion } from "./dom.js";
import { field, h, input, link, select, show } from "./dom.js";
import { archive, pushing } from "./library.js";
import { inShort } from "./results.js";
import { tail } from "./text.js";

const SPLITS = ["valid", "train"].map((name) => [name, `${name}.jsonl`]);
const BITS = [2, 3, 4, 5, 6, 8].map((n) => [n, `${n} bits`]);
const WEIGHTS = [["", "same as base (default)"], ...BITS, ["dense", "not quantized"]];
const DTYPES = ["float32", "bfloat16", "float16"].map((name) => [name, name]);
const TYPES = [["", "same as base (default)"], ...DTYPES];
const GGUF = ["gguf", "GGUF, for llama.cpp"];
const FORMATS = [["peft", "Hugging Face PEFT"], ["mlx-lm", "mlx-lm"], GGUF];
// Milliseconds after which a job counts as accepted: some requests are answered only when the job ends.
const REFUSED = 400;

// Returns the actions for the adapter of a finished run; `values` is its configuration, `schema`
// lists all fields.
export default async function after(row, values, schema) {
  const [model, adapter] = [values.model_dir, row.output_path];
  const query = new URLSearchParams({ model_dir: model });
  const found = await api(`/api/adapters?${query}`).catch(() => ({ adapters: [] }));
  const others = found.adapters.map(({ path }) => path).filter((path) => path !== adapter);
  const jobs = h("div.stack");
  let seen = "";

  // A section with a form; `start` returns requests to the API: paths and bodies.
  function part(name, about, fields, action, start) {
    const problem = h("div", { role: "alert" });
    async function post() {
      for (const [path, body] of start()) await api(path, body);
    }
    async function submit(event) {
      event.preventDefault();
      await attempt(problem, async () => {
        const posted = post();
        await Promise.race([posted, new Promise((go) => setTimeout(go, REFUSED))]);
        announce(`${name} has been queued.`);
        refresh();
        await posted;
      });
      refresh();
    }
    const end = h("div.actions", button(action, null, "primary"));
    const form = h("form.stack", { novalidate: true, onsubmit: submit },
      h("div.fields", fields), end, problem);
    return expansion(name, about, form, "after");
  }

  // A field for the output folder of a job, and a function that returns its value.
  function folder(kind) {
    const control = input(`a new folder in the server's store (${kind})`);
    const element = field("Output folder", control, { kind: "across" });
    return [element, () => control.value.trim() || null];
  }

  function evaluate() {
    const split = select(SPLITS);
    const measured = schema.filter(({ affects }) => affects.includes("loss"));
    return part("Evaluate", "loss without and with the adapter", field("Rows", split),
      "Evaluate base and adapter", () => {
        const own = { split: split.value, adapter_path: adapter, with_base: true };
        for (const name of ["model_dir", "data_dir", ...measured.map((x) => x.name)]) {
          if (name in values) own[name] = values[name];
        }
        return [["/api/finetune/evaluate", own]];
      });
  }

  function fold() {
    const [weights, type, [where, given]] = [select(WEIGHTS), select(TYPES), folder("model")];
    const about = "Lower precision loses more of the update.";
    const shown = [field("Weights", weights, { about }),
      field("dtype of unquantized weights", type), where];
    return part("Merge into base model", "a model without an adapter (mlx-lm: fuse)", shown,
      "Merge into the base", () => {
        const dequantize = weights.value === "dense";
        const bits = dequantize ? null : Number(weights.value) || null;
        const how = { dequantize, bits, dtype: type.value || null, output_dir: given() };
        return [["/api/finetune/merge", { model_dir: model, adapter_path: adapter, ...how }]];
      });
  }

  function exported() {
    const [format, [where, given]] = [select(FORMATS), folder("export")];
    return part("Export", "for PEFT, mlx-lm or llama.cpp", [field("Format", format), where],
      "Export the adapter", () => {
        const how = { method: format.value, output_dir: given() };
        return [["/api/finetune/export", { adapter_path: adapter, base_model: model, ...how }]];
      });
  }

  function merge() {
    const about = "two adapters into one";
    const none = "No other adapter for this model was found: train another one first.";
    const title = "Merge with another adapter";
    if (!others.length) return expansion(title, about, empty(none), "after");
    const [other, [where, given]] = [combobox(), folder("merged")];
    const [own, its] = [input("1"), input("1")];
    other.offer(others.map((path) => [path, tail(path, 2)]));
    const fields = [field("Other adapter", other), field("Weight of this adapter", own)];
    return part(title, about, [fields, field("Weight of the other adapter", its), where],
      "Merge both", () => {
        if (other.value === null) throw new Error("choose the other adapter.");
        const scales = [own, its].map(({ value }) => Number(value.trim() || 1));
        if (!scales.every(Number.isFinite)) throw new Error("a weight must be a number, such as 0.5.");
        const both = { adapter_a: adapter, adapter_b: other.value };
        return [["/api/finetune/merge", { ...both, scales, output_dir: given() }]];
      });
  }

  async function look() {
    const all = (await api("/api/jobs?limit=200")).jobs;
    const rows = all.filter((own) => !own.trains && own.inputs.includes(adapter)).slice(0, 20);
    const state = JSON.stringify(rows);
    if (state === seen) return;
    seen = state;
    show(jobs, rows.map((own) =>
      h("div.row-line", badge(own.status),
        link(`${own.title}: ${own.name}`, `/finetune/job/${own.id}`),
        h("span.muted.wrap", inShort(own)))));
  }

  const refresh = every(3, look);
  await refresh();
  const chat = `/finetune/chat?${new URLSearchParams({ model, adapter })}`;
  return [
    h("div.actions", button("Chat with it", () => location.assign(chat), "primary"),
      h("a.button", { href: archive("adapters", adapter), download: "" }, "Download")),
    h("div", evaluate(), fold(), exported(), merge(),
      expansion("Push to the Hugging Face hub", "to your own repository",
        await pushing(adapter, refresh), "after")),
    jobs,
  ];
}
