// What a job came to, in a few words and whole.

import { facts, notice } from "./dom.js";
import { count, counted, duration, fixed, gb, percent, size, titled } from "./text.js";

// Facts of an outcome: their name, and how their values are said.
const FACTS = {
  steps: ["Steps", count],
  final_train_loss: ["Last training loss", fixed],
  first_val_loss: ["First validation loss", fixed],
  final_val_loss: ["Last validation loss", fixed],
  best_val_loss: ["Best validation loss", fixed],
  best_step: ["Best at step", count],
  wall_s: ["Time", duration],
  tokens_per_sec: ["Speed", (n) => `${count(n)} tokens/s`],
  peak_gb: ["Peak memory", gb],
  planned_gb: ["Planned memory", gb],
  process_gb: ["Memory of the process", gb],
  loss: ["Loss, nats per token", fixed],
  perplexity: ["Perplexity", (n) => fixed(n, 3)],
  tokens: ["Trained tokens", count],
  rows: ["Rows", count],
  truncated: ["Rows cut off", count],
  dropped: ["Rows left out", count],
  lost: ["Share of the update lost in rounding", (share) => percent(share, 2)],
  linears: ["Linears", count],
  linears_in_all: ["Linears in all of them", count],
  linears_in_some: ["Linears in some of them", count],
  size_bytes: ["Size", size],
  method: ["Format", String],
  rank: ["Largest rank", String],
  url: ["Repository", String],
};

export function inShort(row) {
  const { status, kind, error, message, result, output_path } = row;
  if (status !== "done") return error || message || "";
  const found = result ?? {};
  const path = output_path ?? found.path ?? "";
  switch (kind) {
    case "evaluate": {
      const split = found.split ? ` (${found.split})` : "";
      return `loss ${fixed(found.loss)} over ${counted(found.tokens, "token")}${split}`;
    }
    case "push":
      return String(found.url);
    case "fold":
      return `${percent(found.lost, 1)} of the update lost, ${path}`;
    case "finetune":
      return found.final_val_loss
        ? `validation loss ${fixed(found.final_val_loss)}`
        : `loss ${fixed(found.final_train_loss)}`;
  }
  return path;
}

export function shownResult({ kind, result, output_path }) {
  const found = result ?? {};
  const swallowed = (kind === "fold" && found.swallowed) || [];
  const names = swallowed.slice(0, 5).join(", ") + (swallowed.length > 5 ? " …" : "");
  const lost =
    `${counted(swallowed.length, "linear")} lost more than a tenth of the update in ` +
    `rounding (${names}): fold with more bits, or not quantized.`;
  const pairs = Object.entries(FACTS).filter(([name]) => found[name] != null);
  const told = pairs.map(([name, [title, said]]) => [title, said(found[name])]);
  for (const [name, value] of Object.entries(found.metrics ?? {})) {
    told.push([titled(name), fixed(value)]);
  }
  if (output_path ?? found.path) told.push(["Folder", output_path ?? found.path]);
  return [swallowed.length > 0 && notice(lost, "warn"), facts("wide", told)];
}
