// What a job came to, in a few words and whole.

import { facts, notice } from "./dom.js";
import { count, counted, duration, fixed, gb, percent, size, titled } from "./text.js";

// Facts of an outcome: their name, and how their values are said.
const FACTS = {
  wall_s: ["Training time", duration],
  best_step: ["Best at step", count],
  loss: ["Loss", fixed],
  perplexity: ["Perplexity", (n) => fixed(n, 3)],
  tokens: ["Tokens in the loss", count],
  rows: ["Rows", count],
  truncated: ["Truncated rows", count],
  dropped: ["Dropped rows", count],
  process_gb: ["Memory of the process", gb],
  lost: ["Share of the update lost in rounding", (share) => percent(share, 2)],
  linears: ["Linear layers", count],
  linears_in_all: ["Linear layers in all of them", count],
  linears_in_some: ["Linear layers in some of them", count],
  size_bytes: ["Size", size],
  method: ["Format", String],
  rank: ["Largest rank", String],
  url: ["Repository", String],
};

// A loss before and after, and by how much it has changed.
export function compared(before, after) {
  const change = after - before;
  const sign = change > 0 ? "+" : "−";
  const share = percent(Math.abs(change / before), 1);
  return `${fixed(before)} → ${fixed(after)} (${sign}${fixed(Math.abs(change))}, ${sign}${share})`;
}

export function inShort(row) {
  const { status, kind, error, message, result, output_path } = row;
  if (status !== "done") return error || message || "";
  const found = result ?? {};
  const path = output_path ?? found.path ?? "";
  switch (kind) {
    case "evaluate": {
      const split = found.split ? ` (${found.split})` : "";
      const own = found.base ? `base → adapter ${compared(found.base.loss, found.loss)}`
        : `loss ${fixed(found.loss)}`;
      return `${own} over ${counted(found.tokens, "token")}${split}`;
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
    `${counted(swallowed.length, "linear layer")} lost more than a tenth of the update in ` +
    `rounding (${names}): use more bits or export unquantized.`;
  const pairs = Object.entries(FACTS).filter(([name]) => found[name] != null);
  const both = kind === "evaluate" && found.base;
  const told = pairs.map(([name, [title, said]]) => (both && ["loss", "perplexity"].includes(name)
    ? [`${title}, base → adapter`, compared(found.base[name], found[name])]
    : [title, said(found[name])]));
  for (const [name, value] of Object.entries(found.metrics ?? {})) {
    const from = both ? `${fixed(found.base.metrics[name])} → ` : "";
    told.push([titled(name), from + fixed(value)]);
  }
  if (output_path ?? found.path) told.push(["Folder", output_path ?? found.path]);
  return [swallowed.length > 0 && notice(lost, "warn"), facts("wide", told)];
}
