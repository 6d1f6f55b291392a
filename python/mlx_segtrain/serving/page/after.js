// What is done with an adapter: evaluate, fold, export, merge. All of them are jobs.

import { api, every } from "./api.js";
import { announce, badge, button, combobox, empty, expansion, field, h, input, link, notice, select, show } from "./dom.js";
import { inShort } from "./results.js";
import { tail } from "./text.js";

const WEIGHTS = [
  ["", "as the base has them (default)"],
  ...[2, 3, 4, 5, 6, 8].map((n) => [n, `${n} bits`]),
  ["dense", "not quantized"],
];
const TYPES = [["", "the base's (default)"], ...["float32", "bfloat16", "float16"].map((x) => [x, x])];
const FORMATS = [
  ["peft", "Hugging Face PEFT"],
  ["mlx-lm", "mlx-lm"],
  ["gguf", "GGUF, for llama.cpp"],
];
// Milliseconds in which a job that is refused is refused; the answer to some is their end.
const REFUSED = 400;

const folder = (kind) => {
  const made = input(`a new folder in the server's store (${kind})`);
  return [made, field("Folder to write", made, { classes: "across" }), () => made.value.trim() || null];
};

async function inTurn(requests) {
  for (const [path, body] of requests) await api(path, body);
}

// The actions for the adapter of a run that is done. `values` is its configuration, `fields` the
// schema's.
export default async function after(row, values, fields) {
  const [model, adapter] = [values.model_dir, row.output_path];
  const query = new URLSearchParams({ model_dir: model });
  const found = await api(`/api/adapters?${query}`).catch(() => ({ adapters: [] }));
  const others = found.adapters.map(({ path }) => path).filter((path) => path !== adapter);
  const jobs = h("div.stack");
  const group = [];

  // A form in a part of its own; `start` gives addresses and bodies.
  function form(name, about, content, action, start) {
    const problem = h("div", { role: "alert" });
    async function submit(event) {
      event.preventDefault();
      show(problem);
      try {
        const asked = inTurn(start());
        await Promise.race([asked, new Promise((go) => setTimeout(go, REFUSED))]);
        announce(`${name} has been queued.`);
        refresh();
        await asked;
      } catch (error) {
        show(problem, notice(error.message, "bad"));
      }
      refresh();
    }
    const end = action && h("div.actions", button(action, null, "primary"));
    const inner = h("form.stack", { novalidate: true, onsubmit: submit }, content, end, problem);
    return expansion(name, about, inner, group).element;
  }

  function evaluate() {
    const split = select([["valid", "valid.jsonl"], ["train", "train.jsonl"]]);
    const measured = fields.filter((own) => own.affects.includes("loss")).map((own) => own.name);
    return form("Evaluate", "loss with and without the adapter", field("Rows", split), "Evaluate both", () => {
      const own = { split: split.value };
      for (const name of ["model_dir", "data_dir", ...measured]) {
        if (name in values) own[name] = values[name];
      }
      const path = "/api/finetune/evaluate";
      return [
        [path, { ...own, adapter_path: adapter }],
        [path, own],
      ];
    });
  }

  function fold() {
    const [weights, type] = [select(WEIGHTS), select(TYPES)];
    const [, shown, given] = folder("model");
    const content = h(
      "div.fields",
      field("Weights", weights, { about: "Fewer bits round away more of the update." }),
      field("Type of what is not quantized", type),
      shown,
    );
    return form("Fold", "into a model without an adapter", content, "Fold into the base", () => {
      const dequantize = weights.value === "dense";
      const bits = weights.value && !dequantize ? Number(weights.value) : null;
      const how = { dequantize, bits, dtype: type.value || null, output_dir: given() };
      return [["/api/finetune/merge", { model_dir: model, adapter_path: adapter, ...how }]];
    });
  }

  function exported() {
    const format = select(FORMATS);
    const [, shown, given] = folder("export");
    const content = h("div.fields", field("Format", format), shown);
    return form("Export", "for PEFT, mlx-lm or llama.cpp", content, "Export the adapter", () => {
      const how = { method: format.value, output_dir: given() };
      return [["/api/finetune/export", { adapter_path: adapter, base_model: model, ...how }]];
    });
  }

  function merge() {
    const about = "with another adapter";
    if (!others.length) {
      const none = "No other adapter of this model was found: train another one first.";
      return form("Merge", about, empty(none), null, () => []);
    }
    const other = combobox();
    other.offer(others.map((path) => [path, tail(path, 2)]));
    const weights = [input("1"), input("1")];
    const [, shown, given] = folder("merged");
    const content = h(
      "div.fields",
      field("Other adapter", other),
      field("Weight of this one", weights[0]),
      field("Weight of the other", weights[1]),
      shown,
    );
    return form("Merge", about, content, "Merge both", () => {
      if (other.value === null) throw new Error("choose the other adapter.");
      const scales = weights.map((own) => Number(own.value.trim() || 1));
      if (!scales.every(Number.isFinite)) throw new Error("a weight is a number, as 0.5.");
      const both = { adapter_a: adapter, adapter_b: other.value };
      return [["/api/finetune/merge", { ...both, scales, output_dir: given() }]];
    });
  }

  // The jobs that came of it; the base alone was evaluated for it, too.
  function isOfThis({ kind, trains, inputs }) {
    const base = [model, values.data_dir];
    const alone = kind === "evaluate" && inputs.length === 2 && base.every((x) => inputs.includes(x));
    return !trains && (inputs.includes(adapter) || alone);
  }

  let seen = "";
  async function look() {
    const { jobs: all } = await api("/api/jobs?limit=200");
    const rows = all.filter(isOfThis).slice(0, 20);
    const state = JSON.stringify(rows.map(({ id, status, progress }) => [id, status, progress]));
    if (state === seen) return;
    seen = state;
    show(
      jobs,
      rows.map((own) =>
        h(
          "div.row-line",
          badge(own.status),
          link(`${own.title}: ${own.name}`, `/finetune/job/${own.id}`),
          h("span.muted.wrap", inShort(own)),
        ),
      ),
    );
  }

  const chat = `/finetune/chat?${new URLSearchParams({ model, adapter })}`;
  const refresh = every(1.5, look);
  await refresh();
  return [
    h("div.actions", button("Chat with it", () => location.assign(chat), "primary")),
    h("div", evaluate(), fold(), exported(), merge()),
    jobs,
  ];
}
