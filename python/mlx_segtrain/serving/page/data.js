// What a data set trains: counts, lengths, and its first rows token by token.

import { facts, h, notice } from "./dom.js";
import { count, percent } from "./text.js";

// Tokens of a row that are shown: a page of a hundred thousand helps nobody.
const SHOWN = 1500;

// The answer of /api/finetune/inspect-dataset.
export function shownReport(report) {
  const { previews, remarks, tokens, supervised_tokens: trained } = report;
  const told = [
    ["Format", report.format],
    ["Rows to train", count(report.n_train)],
    ["Rows to validate", count(report.n_valid)],
  ];
  if (report.length_max !== null) {
    told.push(["Tokens a row, median", count(report.length_median)]);
    told.push(["95 of 100 rows up to", `${count(report.length_p95)} tokens`]);
    told.push(["Longest row", `${count(report.length_max)} tokens`]);
  }
  if (report.samples !== null && report.samples !== report.n_train) {
    told.push(["Samples", count(report.samples)]);
  }
  if (report.prompt_format) {
    told.push(["Prompts", report.prompt_format === "chat" ? "chat template" : "raw"]);
  }
  if (tokens) {
    told.push(["Trained tokens", `${count(trained ?? 0)} (${percent((trained ?? 0) / tokens)})`]);
  }
  return [
    !report.ok && notice(report.error ?? "the data cannot be read.", "bad", { role: "alert" }),
    facts("", told),
    remarks.map((remark) => notice(`${remark}.`, "warn")),
    previews.length > 0 && legend(),
    previews.flatMap(preview),
  ].flat();
}

const legend = () =>
  h(
    "div.row-line.small",
    h("span.muted", "First rows, token by token:"),
    h("span.tokens.legend", h("mark", h("span", "trained"))),
    h("span.tokens.legend", h("span", "only read")),
  );

// A row as it is trained: runs of tokens, each of them trained or only read.
function preview({ source, tokens, findings }) {
  const runs = [];
  let last = null;
  for (const [text, trained, weight] of tokens.slice(0, SHOWN)) {
    if (trained !== last) runs.push(h(trained ? "mark" : "span"));
    last = trained;
    const factor = weight > 0 && weight !== 1 && h("sup", `×${weight}`);
    const visible = text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");
    runs.at(-1).append(h("span", visible, factor));
  }
  const more = tokens.length - SHOWN;
  return [
    h("div.small.muted.wrap", source),
    findings.map((finding) => notice(`${finding}.`, "warn")),
    h("div.tokens", { tabindex: 0, role: "group", "aria-label": "Tokens of a row" }, runs),
    more > 0 && h("div.small.muted", `and ${count(more)} more tokens`),
  ].flat();
}
