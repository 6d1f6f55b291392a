// A run's parameters as a form, from the schema alone. Only what was changed is sent.

import { expansion, h, input, labelled, select } from "./dom.js";

const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;

// One parameter: what was given, if anything was.
class Field {
  constructor(row, onchange) {
    this.row = row;
    this.words = row.type === "bool" ? ["true", "false"] : row.is_list ? [] : row.choices;
    let about = row.description;
    if (!row.choices.length && row.type !== "bool") {
      about += ` Takes ${row.allowed.replaceAll(">=", "≥").replaceAll("<=", "≤")}.`;
    }
    const wide = row.is_list || row.type === "Path";
    const changed = () => {
      this.complain("");
      this.mark();
      onchange();
    };
    this.control = this.#control(changed);
    const how = { about, key: row.name, classes: wide ? "across" : "" };
    Object.assign(this, labelled(row.title, this.control, how));
  }

  #control(changed) {
    const { row } = this;
    if (this.words.length) return select([], changed);
    if (row.texts) {
      const placeholder = "none: one prompt a line";
      return h("textarea", { rows: 2, placeholder, oninput: changed });
    }
    const inputmode = ["int", "float"].includes(row.type) ? "decimal" : null;
    return input("", { inputmode, oninput: changed });
  }

  // Shows it if it has an effect with the method, and its default then.
  suit(method) {
    const { row, control } = this;
    this.shown = row.methods.length === 0 || row.methods.includes(method);
    this.element.hidden = !this.shown;
    const standard = row.defaults[method] ?? row.default;
    if (this.words.length) {
      const named = { true: "yes", false: "no" };
      const name = (word) => (row.type === "bool" ? named[word] : word);
      const before = control.value;
      const others = this.words.filter((word) => word !== standard);
      const options = [["", `${name(standard)} (default)`], ...others.map((x) => [x, name(x)])];
      control.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
      control.value = others.includes(before) ? before : "";
    } else if (!row.texts) {
      const made = row.name === "adapter_path";
      control.placeholder = made ? "a new folder in the server's store" : standard;
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
    if (row.texts) return text.split("\n").map((x) => x.trim()).filter(Boolean);
    if (row.is_list) return text.split(/[\s,]+/).filter(Boolean);
    if (row.type === "bool") return text === "true";
    return NUMBER.test(text) ? Number(text) : text;
  }

  // Shows a value, as of an earlier run.
  put(value) {
    let text = String(value);
    if (Array.isArray(value)) text = value.join(this.row.texts ? "\n" : ", ");
    else if (typeof value === "object") text = Object.keys(value).length ? JSON.stringify(value) : "";
    this.control.value = text;
    if (this.control.value !== text) this.control.value = ""; // the default of a choice
  }
}

// All parameters of a run but model and data. `defaults` is the answer of /api/finetune/defaults.
export class Form {
  constructor({ fields, groups }, onchange) {
    const changed = () => {
      this.#suit();
      onchange();
    };
    // Paths, which are wide, come last in their block.
    const rows = [...fields].sort((a, b) => (a.type === "Path") - (b.type === "Path"));
    this.fields = {};
    this.parts = {};
    const blocks = groups.map((group) => {
      const own = rows.filter((row) => row.group === group);
      for (const row of own) this.fields[row.name] = new Field(row, changed);
      const inner = h("div.fields", own.map((row) => this.fields[row.name].element));
      if (group === "" || own.length === 0) return own.length ? inner : null;
      const what = own.slice(0, 4).map((row) => row.title.split(",")[0]);
      if (own.length > 4) what.push("…");
      this.parts[group] = expansion(group, what.join(" · "), inner);
      return this.parts[group].element;
    });
    this.blocks = blocks.filter(Boolean);
    this.#suit();
  }

  get method() {
    return this.fields.method.given ?? this.fields.method.row.default;
  }

  #suit() {
    const all = Object.values(this.fields);
    this.fields.method.suit(this.fields.method.control.value);
    all.forEach((own) => own.suit(this.method));
    for (const [group, { element }] of Object.entries(this.parts)) {
      element.hidden = !all.some((own) => own.row.group === group && own.shown);
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
    Object.values(this.fields).forEach((other) => other !== own && other.complain(""));
    own?.complain(problem.message);
    this.parts[own?.row.group]?.open();
  }
}
