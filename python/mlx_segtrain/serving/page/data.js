// The report on a data set: counts, lengths, and the tokens of its first rows.

import { expansion, facts, h, notice } from "./dom.js";
import { count, counted, percent, sentence } from "./text.js";

// Maximum number of tokens shown per row.
const SHOWN = 1500;

// Shows a successful response of /api/finetune/inspect-dataset.
export function shownReport(own) {
  const trained = own.supervised_tokens ?? 0;
  const lengths = own.length_max !== null;
  const told = [
    ["Format", own.format],
    ["Training rows", count(own.n_train)],
    ["Validation rows", count(own.n_valid)],
    lengths && ["Tokens per row",
      `${count(own.length_median)} median, ${count(own.length_max)} at most`],
    lengths && ["95th percentile", `${count(own.length_p95)} tokens`],
    ![null, own.n_train].includes(own.samples) && ["Samples", count(own.samples)],
    own.duplicates > 0 && ["Repeated rows", count(own.duplicates)],
    own.packed && ["Packed", `${count(own.packed.rows)} rows, ${percent(1 - own.packed.unused)} full`],
    own.prompt_format && ["Prompts", own.prompt_format === "chat" ? "chat template" : "raw"],
    own.tokens && ["Tokens in the loss", `${count(trained)} (${percent(trained / own.tokens)})`],
  ];
  const [first, ...others] = own.previews;
  return [
    facts("", told.filter(Boolean)),
    own.remarks.map((remark) => notice(sentence(remark), "warn")),
    first && [
      h("div.row-line.small", h("span.muted", "First row, token by token:"),
        h("span.tokens.legend", h("mark", h("span", "in the loss"))),
        h("span.tokens.legend", h("span", "context only"))),
      preview(first),
    ],
    others.length > 0 &&
      expansion(`${counted(others.length, "more row")}`, "", h("div.stack", others.map(preview))),
  ];
}

// A row as runs of tokens, each of which is in the loss or context only.
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
    findings.map((finding) => notice(sentence(finding), "warn")),
    h("div.tokens", { tabindex: 0, role: "group", "aria-label": `Tokens of ${source}` }, runs),
    more > 0 && h("div.small.muted", `and ${count(more)} more tokens`),
  ];
}
