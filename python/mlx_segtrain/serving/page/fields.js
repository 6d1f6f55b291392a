// A run's parameters as a form, from the schema alone. Only what was changed is sent.

import { expansion, h, input, labelled, select } from "./dom.js";

const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;

// One parameter: what was given, if anything was.
class Field {
  constructor(row, onchange) {
    this.row = row;
    this.words = row.type === "bool" ? ["true", "false"] : row.is_list ? [] : row.choices;
    const changed = () => {
      this.complain("");
      this.mark();
      onchange();
    };
    if (this.words.length) this.control = select([], changed);
    else if (row.texts) this.control = h("textarea", { rows: 2, oninput: changed });
    else this.control = input("", { oninput: changed });
    if (["int", "float"].includes(row.type)) this.control.inputMode = "decimal";
    const takes = row.allowed.replaceAll(">=", "≥").replaceAll("<=", "≤");
    const about = row.description + (this.words.length ? "" : ` Takes ${takes}.`);
    const kind = row.is_list || row.type === "Path" ? "across" : "";
    Object.assign(this, labelled(row.title, this.control, { about, key: row.name, kind }));
  }

  // Shows it if it has an effect with the method, and its default then.
  suit(method) {
    const { row, control, words } = this;
    this.shown = !row.methods.length || row.methods.includes(method);
    this.element.hidden = !this.shown;
    const standard = row.defaults[method] ?? row.default;
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
      control.placeholder = row.texts ? "none: one prompt a line" : made || standard;
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
    if (row.is_list) return text.split(row.texts ? /\s*\n\s*/ : /[\s,]+/).filter(Boolean);
    if (row.type === "bool") return text === "true";
    return NUMBER.test(text) ? Number(text) : text;
  }

  // Shows a value, as of an earlier run.
  put(value) {
    let text = String(value);
    if (Array.isArray(value)) text = value.join(this.row.texts ? "\n" : ", ");
    else if (typeof value === "object") text = JSON.stringify(value);
    this.control.value = text;
    if (this.control.value !== text) this.control.value = ""; // the default of a choice
  }
}

// All parameters of a run but model and data. `schema` is the answer of /api/finetune/defaults.
export class Form {
  fields = {};
  parts = {};
  blocks = [];

  constructor({ fields, groups }, onchange) {
    const changed = () => {
      this.#suit();
      onchange();
    };
    // Paths, which are wide, come last in their block.
    const rows = [...fields].sort((a, b) => (a.type === "Path") - (b.type === "Path"));
    for (const group of groups) {
      const own = rows.filter((row) => row.group === group);
      if (!own.length) continue;
      for (const row of own) this.fields[row.name] = new Field(row, changed);
      const block = h("div.fields", own.map((row) => this.fields[row.name].element));
      const what = own.slice(0, 4).map((row) => row.title.split(",")[0]);
      if (own.length > 4) what.push("…");
      if (group) this.parts[group] = expansion(group, what.join(" · "), block);
      this.blocks.push(this.parts[group] ?? block);
    }
    this.#suit();
  }

  get method() {
    return this.fields.method.control.value || this.fields.method.row.default;
  }

  #suit() {
    const all = Object.values(this.fields);
    all.forEach((own) => own.suit(this.method));
    for (const [group, part] of Object.entries(this.parts)) {
      part.hidden = !all.some((own) => own.row.group === group && own.shown);
    }
  }

  // What was changed.
  get values() {
    const given = Object.entries(this.fields).map(([name, own]) => [name, own.given]);
    return Object.fromEntries(given.filter(([, value]) => value !== null));
  }

  put(values) {
    for (const [name, value] of Object.entries(values)) this.fields[name]?.put(value);
    this.#suit();
  }

  // Shows what is wrong at the field that it is about, if there is one; null is nothing.
  complain(problem) {
    const own = this.fields[problem?.field];
    Object.values(this.fields).forEach((x) => x.complain(x === own ? problem.message : ""));
    if (this.parts[own?.row.group]) this.parts[own.row.group].open = true;
  }
}
