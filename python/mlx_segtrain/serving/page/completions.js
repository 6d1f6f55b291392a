// The completions of a step of a GRPO run, the best completion of each prompt first.

import { api } from "./api.js";
import { button, card, expansion, facts, h, notice, show } from "./dom.js";
import { count, counted, fixed } from "./text.js";

// A card with a method `draw(run)`, which shows the newest completions; hidden while there are none.
export function completionsView(id) {
  const number = h("input", { type: "number", min: 1, step: 1, "aria-label": "Step",
    onchange: () => look(Number(number.value)) });
  const [before, after] = [button("Previous step", () => look(shown - 1)),
    button("Next step", () => look(shown + 1))];
  const newest = button("Newest", () => look(null));
  const where = h("span.muted.small");
  const list = h("div.stack");
  const element = card("Completions",
    h("div.actions", h("label", "Step ", number), before, after, newest, where), list);
  element.hidden = true;
  let [shown, last, follows, asked, asking] = [0, 0, true, 0, false];

  async function look(step) {
    follows = step === null;
    if (asking) return;
    asking = true;
    try {
      const wanted = step === null ? "" : `?step=${Math.max(1, Math.min(step || 1, last))}`;
      const found = await api(`/api/jobs/${encodeURIComponent(id)}/completions${wanted}`);
      ({ last, step: shown } = found);
      if (!last) return;
      element.hidden = false;
      [number.value, number.max] = [shown, last];
      [before.disabled, after.disabled, newest.disabled] = [shown <= 1, shown >= last, follows];
      where.textContent = `of ${count(last)}`;
      show(list, groups(found.completions));
    } catch (error) {
      element.hidden = false;
      show(list, notice(error.message, "warn", { role: "alert" }));
    } finally {
      asking = false;
    }
  }

  function draw({ step }) {
    if (step === asked || !follows) return;
    asked = step;
    look(null);
  }

  return { element, draw };
}

// The completions by prompt, the best ones first.
function groups(completions) {
  const own = Object.groupBy(completions, ({ row }) => row);
  return Object.entries(own).map(([row, made]) => {
    const best = made.toSorted((a, b) => b.reward - a.reward);
    const mean = made.reduce((sum, { reward }) => sum + reward, 0) / made.length;
    const { prompt } = made[0];
    return h("section.stack", h("h3.wrap", asText(prompt)),
      h("p.small.muted.wrap", `${row} · mean reward ${fixed(mean, 3)}`),
      best.map((one, i) => expansion(h("span.wrap", said(one)), about(one), whole(one), `${row} ${i}`)));
  });
}

const asText = (prompt) => (typeof prompt === "string" ? prompt
  : Array.isArray(prompt) ? String(prompt.at(-1)?.content ?? "") : String(prompt ?? ""));

const FINISHES = { length: "truncated", turns: "out of turns" };

const about = ({ reward, tokens, finish }) =>
  [`reward ${fixed(reward, 3)}`, counted(tokens, "token"), FINISHES[finish]].filter(Boolean).join(" · ");

function said({ text }) {
  const own = String(text).replace(/\s+/g, " ").trim();
  return own.length > 90 ? `${own.slice(0, 90)}…` : own || "(nothing)";
}

function whole({ text, messages, rewards, advantage }) {
  const turns = Array.isArray(messages) ? messages : [{ role: "assistant", content: text }];
  const pairs = turns.map(({ role, content, tool_calls: calls }) =>
    [role, [content, calls && `calls ${JSON.stringify(calls.map((own) => own.function))}`]
      .filter(Boolean).join("\n")]);
  const scores = Object.entries(rewards).map(([name, value]) => [name, fixed(value, 3)]);
  return [facts("samples", pairs), facts("wide", [...scores, ["advantage", fixed(advantage, 3)]])];
}
