// What a data set trains: counts, lengths, and its first rows token by token.

import { facts, h, notice } from "./dom.js";
import { count, percent } from "./text.js";

// Tokens of a row that are shown: a page of a hundred thousand helps nobody.
const SHOWN = 1500;

// The answer of /api/finetune/inspect-dataset.
export function shownReport(own) {
  const trained = own.supervised_tokens ?? 0;
  const lengths = own.length_max !== null;
  const told = [
    ["Format", own.format],
    ["Rows to train", count(own.n_train)],
    ["Rows to validate", count(own.n_valid)],
    lengths && ["Tokens a row, median", count(own.length_median)],
    lengths && ["95 of 100 rows up to", `${count(own.length_p95)} tokens`],
    lengths && ["Longest row", `${count(own.length_max)} tokens`],
    ![null, own.n_train].includes(own.samples) && ["Samples", count(own.samples)],
    own.duplicates > 0 && ["Equal to an earlier row", count(own.duplicates)],
    own.packed && ["Packed", `${count(own.packed.rows)} rows, ${percent(1 - own.packed.unused)} full`],
    own.prompt_format && ["Prompts", own.prompt_format === "chat" ? "chat template" : "raw"],
    own.tokens && ["Trained tokens", `${count(trained)} (${percent(trained / own.tokens)})`],
  ];
  return [
    !own.ok && notice(own.error ?? "the data cannot be read.", "bad", { role: "alert" }),
    facts("", told.filter(Boolean)),
    own.remarks.map((remark) => notice(`${remark}.`, "warn")),
    own.previews.length > 0 &&
      h("div.row-line.small", h("span.muted", "First rows, token by token:"),
        h("span.tokens.legend", h("mark", h("span", "trained"))),
        h("span.tokens.legend", h("span", "only read"))),
    own.previews.map(preview),
  ];
}

// A row as it is trained: runs of tokens, each of them trained or only read.
function preview({ source, tokens, findings }) {
  const runs = [];
  for (const [i, [text, trained, weight]] of tokens.slice(0, SHOWN).entries()) {
    if (trained !== tokens[i - 1]?.[1]) runs.push(h(trained ? "mark" : "span"));
    const factor = weight > 0 && weight !== 1 && h("sup", `×${weight}`);
    runs.at(-1).append(h("span", text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥"), factor));
  }
  const more = tokens.length - SHOWN;
  return [
    h("div.small.muted.wrap", source),
    findings.map((finding) => notice(`${finding}.`, "warn")),
    h("div.tokens", { tabindex: 0, role: "group", "aria-label": "Tokens of a row" }, runs),
    more > 0 && h("div.small.muted", `and ${count(more)} more tokens`),
  ];
}
