// Formats numbers, times and events; a non-breaking space precedes units.

import { now } from "./api.js";

const SPACE = "\u00a0";
const NONE = "–";

export const count = (n) => Math.round(n).toLocaleString("en-US");
export const counted = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
export const fixed = (value, digits = 4) =>
  Number.isFinite(value) ? value.toFixed(digits) : NONE;
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}${SPACE}%`;
export const titled = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
// The last parts of a path.
export const tail = (path, parts = 1) =>
  (path ?? "").replace(/\/+$/, "").split("/").slice(-parts).join("/");
export const sentence = (message) => (/[.?!]$/.test(message) ? message : `${message}.`);
// A learning rate.
export const rate = (value) => (Number.isFinite(value) ? String(+value.toPrecision(3)) : NONE);

const shortened = (units, rest) => (n) => {
  const [unit, least] = units.find(([, own]) => n >= own) ?? [rest, 1];
  const digits = least > 1 && n < 100 * least ? 1 : 0;
  return (n / least).toFixed(digits) + (unit && SPACE + unit);
};
export const size = shortened([["GB", 1e9], ["MB", 1e6], ["kB", 1e3]], "B");
export const many = shortened([["B", 1e9], ["M", 1e6], ["k", 1e3]], "");
export const gb = (value) => (Number.isFinite(value) ? size(1e9 * value) : NONE);

const bitsOf = (model) => (model.bits ? `${model.bits} bits` : "not quantized");

// Describes a model in a list.
export const described = (model) =>
  [model.id, model.family, many(model.parameters), bitsOf(model), size(model.size_bytes)]
    .join(" · ");

export function duration(seconds) {
  const total = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  const [minutes, hours] = [Math.floor(total / 60), Math.floor(total / 3600)];
  if (total < 60) return `${total}${SPACE}s`;
  if (hours < 1) return `${minutes}${SPACE}min${SPACE}${two(total % 60)}${SPACE}s`;
  return `${hours}${SPACE}h${SPACE}${two(minutes % 60)}${SPACE}min`;
}

// Returns the seconds since a time in UTC, as stored in a job's row.
const since = (time) => (now() - Date.parse(`${time.replace(" ", "T")}Z`)) / 1000;

export function ago(time) {
  const units = [["day", 86400], ["h", 3600], ["min", 60]];
  const found = units.find(([, length]) => since(time) >= length);
  if (!found) return "just now";
  const [unit, length] = found;
  const n = Math.floor(since(time) / length);
  return `${n} ${unit}${unit === "day" && n > 1 ? "s" : ""} ago`;
}

// Returns how long the last attempt at a job has taken.
export function took(row) {
  if (!row.started_at) return NONE;
  return duration(Math.max(0, since(row.started_at) - (row.ended_at ? since(row.ended_at) : 0)));
}

// Formats an event as a line of the log.
export function line(event) {
  const clock = typeof event.ts === "string" ? `${event.ts.slice(11, 19)} ` : "";
  switch (event.type) {
    case "log":
      return String(event.line);
    case "queued":
      return `${clock}queued${event.resumed ? " again" : ""}`;
    case "started":
      return `${clock}started as process ${event.pid}`;
    case "stage":
      return `${event.stage}: ${event.message}`;
    case "warning":
      return `warning: ${event.message}`;
    case "sample":
      return `step ${event.step}, answer to ${JSON.stringify(event.prompt)}: ${event.text}`;
    case "failed":
      return `${clock}failed: ${event.error}`;
    case "cancelled":
      return `${clock}cancelled${event.message ? `: ${event.message}` : ""}`;
    case "done":
      return `${clock}done${event.output_dir ? `: ${event.output_dir}` : ""}`;
    case "metric":
      return metric(event);
  }
  return JSON.stringify(event);
}

function metric({ kind, step, loss, tokens, message, learning_rate, grad_norm, peak_gb, ...more }) {
  if (kind === "val") {
    const of = Number.isInteger(tokens) ? `, ${count(tokens)} tokens` : "";
    return `step ${step} validation loss ${fixed(loss)}${of}`;
  }
  if (kind === "train") {
    const norm = `gradient norm ${fixed(grad_norm, 3)}`;
    return `${message}, rate ${rate(learning_rate)}, ${norm}, peak ${fixed(peak_gb, 2)} GB`;
  }
  return `step ${step} scores ${JSON.stringify(more.scores) ?? more.error}`;
}

// Formats a table as CSV; cells that a spreadsheet would read as formulas become text.
export const csv = (rows) =>
  rows.map((row) => row.map((cell) => {
    const text = typeof cell === "number" ? String(cell) : String(cell ?? "").replace(/^[=+@-]/, "'$&");
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",")).join("\n") + "\n";

// Saves a table as a file in the browser.
export function save(name, rows) {
  const url = URL.createObjectURL(new Blob([csv(rows)], { type: "text/csv" }));
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
