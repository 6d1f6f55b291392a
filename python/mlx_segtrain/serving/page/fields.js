// The form for a run's settings, made from the schema. Only changed settings are sent.

import { button, expansion, h, input, labelled, select } from "./dom.js";
import { counted } from "./text.js";

const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;
// Settings that are always visible; all others are in sections that can be opened.
const BASIC = ["max_seq_length", "iters", "learning_rate", "method"];
// Presets: name, description, and values. Each preset sets all fields that occur in any preset.
export const PRESETS = [
  ["Quick try", "20 steps to check that everything works",
    { iters: 20, steps_per_report: 1, steps_per_eval: 10 }],
  ["Standard", "300 steps with warmup and a falling learning rate",
    { iters: 300, lr_schedule: "cosine", warmup_iters: 10 }],
  ["Thorough", "3 epochs, twice the rank, and a lower learning rate",
    { epochs: 3, rank: 16, learning_rate: 1e-4, lr_schedule: "cosine", warmup_iters: 20 }],
];
const PRESET = [...new Set(PRESETS.flatMap(([, , values]) => Object.keys(values)))];

// One setting.
class Field {
  constructor(row, onchange) {
    this.row = row;
    this.words = row.type === "bool" ? ["true", "false"] : row.is_list ? [] : row.choices;
    const changed = () => {
      this.complain();
      this.mark();
      onchange();
    };
    if (this.words.length) this.control = select([], changed);
    else if (row.texts) this.control = h("textarea", { rows: 2, oninput: changed });
    else this.control = input("", { oninput: changed });
    if (["int", "float"].includes(row.type)) this.control.inputMode = "decimal";
    const takes = row.allowed.replaceAll(">=", "≥").replaceAll("<=", "≤");
    const about = row.description + (this.words.length ? "" : ` Allowed: ${takes}.`);
    const kind = row.is_list || row.type === "Path" ? "across" : "";
    Object.assign(this, labelled(row.title, this.control, { about, key: row.name, kind }));
  }

  // Shows the field, with its default, if it applies to the method. `valueOf` returns other settings.
  suit(valueOf) {
    const { row, control, words } = this;
    this.shown = !row.methods.length || row.methods.includes(valueOf("method"));
    this.element.hidden = !this.shown;
    const standard = standardOf(row, valueOf);
    if (words.length) {
      const named = row.type === "bool" ? { true: "yes", false: "no" } : {};
      const options = words.map((x) => [x === standard ? "" : x, named[x] ?? x]);
      options.sort(([a], [b]) => (a !== "") - (b !== ""));
      options[0][1] += " (default)";
      const before = control.value;
      control.replaceChildren(...select(options).children);
      this.put(before);
    } else {
      const made = row.name === "adapter_path" && "a new folder in the server's store";
      control.placeholder = row.texts ? "one prompt per line" : made || standard;
    }
    this.mark();
  }

  mark() {
    this.element.classList.toggle("changed", this.given !== null);
  }

  // The value to send; null for the default.
  get given() {
    const { row } = this;
    const text = this.control.value.trim();
    if (!text || !this.shown) return null;
    if (this.control.value === this.loaded?.text) return this.loaded.list;
    if (row.is_list) return text.split(row.texts ? /\s*\n\s*/ : /[\s,]+/).filter(Boolean);
    if (row.type === "bool") return text === "true";
    return NUMBER.test(text) ? Number(text) : text;
  }

  // The error in the loaded value, until the value is changed.
  get fault() {
    const [value, message] = this.wrong ?? [];
    return value === this.control.value ? message ?? "" : "";
  }

  // Sets the value, for example that of an earlier run.
  put(value) {
    let text = String(value);
    if (Array.isArray(value)) text = value.join(this.row.texts ? "\n" : ", ");
    else if (typeof value === "object") text = JSON.stringify(value);
    this.control.value = text;
    if (this.control.value !== text) this.control.value = ""; // the default of a choice
    // Until it is changed, a list is kept, because a line break in one of its texts would divide this text.
    if (this.row.texts && Array.isArray(value)) this.loaded = { text: this.control.value, list: value };
  }
}

// A field's default in words. It may depend on other settings, which `valueOf` returns.
export const standardOf = (row, valueOf) => Object.entries(row.defaults)
  .map(([name, defaults]) => defaults[valueOf(name)]).find((own) => own !== undefined) ?? row.default;

// All settings except model and data, from the response of /api/finetune/defaults.
export class Form {
  fields = {};
  parts = new Map(); // sections, each with its fields

  constructor({ fields, groups }, onchange) {
    const changed = () => {
      this.#suit();
      onchange();
    };
    // Paths are wide, so they are last in their section.
    const rows = [...fields].sort((a, b) => (a.type === "Path") - (b.type === "Path"));
    for (const row of rows) {
      if (groups.includes(row.group)) this.fields[row.name] = new Field(row, changed);
    }
    const basic = BASIC.map((name) => this.fields[name]);
    for (const group of groups) {
      const own = rows.filter((row) => row.group === group && !BASIC.includes(row.name));
      if (!own.length) continue;
      const block = h("div.fields", own.map((row) => this.fields[row.name].element));
      const what = own.slice(0, 4).map((row) => row.title.split(",")[0]);
      if (own.length > 4) what.push("…");
      const part = expansion(group || "Rank, batch size and folder", what.join(" · "), block);
      part.querySelector("summary").append(h("span.small.some"));
      this.parts.set(part, own.map((row) => this.fields[row.name]));
    }
    this.presets = PRESETS.map(([name, about, values]) => {
      const own = button(name, () => {
        for (const key of PRESET) this.fields[key].control.value = "";
        for (const [key, value] of Object.entries(values)) this.fields[key].put(value);
        Object.values(this.fields).forEach((field) => field.complain());
        changed();
      }, "preset");
      own.append(h("span.small.muted", about));
      return own;
    });
    this.element = [
      h("div.presets", { role: "group", "aria-label": "Presets" }, this.presets),
      h("div.fields.basic", basic.map((own) => own.element)),
      h("div.parts", [...this.parts.keys()]),
    ];
    this.#suit();
  }

  get method() {
    return this.#valueOf("method");
  }

  #valueOf = (name) => this.fields[name].control.value || this.fields[name].row.default;

  #suit() {
    Object.values(this.fields).forEach((own) => own.suit(this.#valueOf));
    for (const [part, own] of this.parts) {
      part.hidden = !own.some((field) => field.shown);
      const n = own.filter((field) => field.given !== null).length;
      part.querySelector(".some").textContent = n ? `${counted(n, "setting")} changed` : "";
    }
    const inWords = (name, value) => String(value ?? standardOf(this.fields[name].row, this.#valueOf));
    for (const [i, [, , values]] of PRESETS.entries()) {
      const is = PRESET.every((name) =>
        inWords(name, this.fields[name].given) === inWords(name, values[name]));
      this.presets[i].setAttribute("aria-pressed", is);
    }
  }

  // The changed settings.
  get values() {
    const given = Object.entries(this.fields).map(([name, own]) => [name, own.given]);
    return Object.fromEntries(given.filter(([, value]) => value !== null));
  }

  put(values) {
    const known = Object.keys(values).filter((name) => this.fields[name]);
    // The settings on which defaults depend come first.
    const first = new Set(Object.values(this.fields).flatMap(({ row }) => Object.keys(row.defaults)));
    for (const names of [known.filter((name) => first.has(name)), known.filter((name) => !first.has(name))]) {
      names.forEach((name) => this.fields[name].put(values[name]));
      this.#suit();
    }
  }

  // Replaces all values, and shows the errors in them until the values are changed.
  fill(values, faults) {
    for (const own of Object.values(this.fields)) own.control.value = "";
    this.put(Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null)));
    for (const own of Object.values(this.fields)) {
      const fault = faults.find(({ field }) => field === own.row.name);
      own.wrong = fault && [own.control.value, fault.message];
    }
    this.complain(null);
  }

  // Shows a problem at its field, and returns the field if there is one; null removes the last problem.
  complain(problem) {
    const own = this.fields[problem?.field];
    Object.values(this.fields).forEach((x) => x.complain(x === own ? problem.message : x.fault));
    own?.element.closest("details")?.setAttribute("open", "");
    return own;
  }
}
