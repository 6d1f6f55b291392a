// Shows the result of a job, in one line or in full.

import { facts, notice } from "./dom.js";
import { count, counted, duration, fixed, gb, percent, size, titled } from "./text.js";

// Facts of a result: their titles, and the formats of their values.
const FACTS = {
  wall_s: ["Training time", duration],
  best_step: ["Best at step", count],
  reward: ["Reward", fixed],
  reward_std: ["Standard deviation of the reward", fixed],
  length: ["Length of completions", (n) => `${fixed(n, 1)} tokens`],
  perplexity: ["Perplexity", (n) => fixed(n, 3)],
  tokens: ["Tokens in the loss", count],
  rows: ["Rows", count],
  completions: ["Completions per prompt", count],
  truncated: ["Truncated rows", count],
  dropped: ["Dropped rows", count],
  process_gb: ["Process memory", gb],
  lost: ["Share of the update lost in rounding", (share) => percent(share, 2)],
  linears: ["Linear layers", count],
  linears_in_all: ["Linear layers in every adapter", count],
  linears_in_some: ["Linear layers in some adapters only", count],
  size_bytes: ["Size", size],
  method: ["Format", String],
  rank: ["Largest rank", String],
  url: ["Repository", String],
};

// A value before and after, with the difference.
export function compared(before, after, unit = "") {
  const change = after - before;
  const sign = change > 0 ? "+" : "−";
  const share = before ? `, ${sign}${percent(Math.abs(change / before), 1)}` : "";
  const whole = `${fixed(before)} → ${fixed(after)}${unit && ` ${unit}`}`;
  return `${whole} (${sign}${fixed(Math.abs(change))}${share})`;
}

export const broken = ({ status }) => ["failed", "cancelled"].includes(status);
export const ended = (row) => row.status === "done" || broken(row);

// The name of a job's measure, and its formatted value with the unit.
export const judged = ({ rewarded }) => (rewarded ? "reward" : "loss");
const valued = (row, value) => fixed(value) + (row.rewarded || !row.loss_unit ? "" : ` ${row.loss_unit}`);

export function inShort(row) {
  const { status, kind, error, message, result, output_path } = row;
  if (status !== "done") return error || message || "";
  const found = result ?? {};
  const path = output_path ?? found.path ?? "";
  switch (kind) {
    case "evaluate": {
      const split = found.split ? ` (${found.split})` : "";
      const name = judged(row);
      const unit = row.rewarded ? "" : row.loss_unit ?? "";
      const own = found.base ? `base → adapter ${compared(found.base[name], found[name], unit)}`
        : `${name} ${valued(row, found[name])}`;
      const over = row.rewarded ? counted(found.rows, "prompt") : counted(found.tokens, "token");
      return `${own} over ${over}${split}`;
    }
    case "push":
      return String(found.url);
    case "fold":
      return `${percent(found.lost, 1)} of the update lost, ${path}`;
    case "finetune":
      if (!Number.isFinite(found.final_val_loss)) return `loss ${valued(row, found.final_train_loss)}`;
      // With rewards, the loss is the negated reward.
      return row.rewarded ? `validation reward ${fixed(-found.final_val_loss)}`
        : `validation loss ${valued(row, found.final_val_loss)}`;
  }
  return path;
}

export function shownResult(row) {
  const { kind, result, output_path, rewarded } = row;
  const found = result ?? {};
  const swallowed = (kind === "fold" && found.swallowed) || [];
  const names = swallowed.slice(0, 5).join(", ") + (swallowed.length > 5 ? " …" : "");
  const lost =
    `${counted(swallowed.length, "linear layer")} lost more than a tenth of the update in ` +
    `rounding (${names}): use more bits or export unquantized.`;
  const named = { loss: ["Loss", (value) => valued(row, value)], ...FACTS,
    ...rewarded && { truncated: ["Truncated completions", (share) => percent(share, 1)] } };
  const pairs = Object.entries(named).filter(([name]) => found[name] != null);
  const both = kind === "evaluate" && found.base;
  const told = pairs.map(([name, [title, said]]) => (both && ["loss", "perplexity", "reward"].includes(name)
    ? [`${title}, base → adapter`,
      compared(found.base[name], found[name], name === "loss" ? row.loss_unit ?? "" : "")]
    : [title, said(found[name])]));
  for (const [k, share] of Object.entries(found.pass_at ?? {})) {
    const from = both ? `${percent(found.base.pass_at[k], 1)} → ` : "";
    told.push([`pass@${k}`, from + percent(share, 1)]);
  }
  for (const [name, value] of Object.entries(found.metrics ?? {})) {
    const from = both ? `${fixed(found.base.metrics[name])} → ` : "";
    told.push([titled(name), from + fixed(value)]);
  }
  if (output_path ?? found.path) told.push(["Folder", output_path ?? found.path]);
  return [swallowed.length > 0 && notice(lost, "warn"), facts("wide", told)];
}
