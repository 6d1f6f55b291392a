// The log of a job, a page at a time: hundreds of thousands of lines are too many to be shown.

import { button, card, h } from "./dom.js";
import { count } from "./text.js";

const PAGE = 500;

// `draw()` shows what is new in the run's lines; the newest page grows.
export function logView(run) {
  let [wanted, page, shown] = [null, -1, 0]; // null is the newest page
  const view = h("div.log", { tabindex: 0, role: "log", "aria-live": "off", "aria-label": "Log" });
  const where = h("span.muted.small");
  const turns = [button("Older", () => turn(-1)), button("Newer", () => turn(1))];
  const element = card("Log", view, h("div.actions", where, turns));
  const last = () => Math.max(0, Math.ceil(run.lines.length / PAGE) - 1);

  function turn(by) {
    wanted = Math.max(0, page + by);
    if (wanted >= last()) wanted = null;
    draw();
  }

  function draw() {
    const number = wanted ?? last();
    if (number !== page) [page, shown] = [number, (view.replaceChildren(), 0)];
    const first = page * PAGE;
    const lines = run.lines.slice(first + shown, first + PAGE);
    const atEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 20;
    view.append(...lines.map(([text, kind]) => h("div", { class: kind }, text || " ")));
    if (atEnd && lines.length) view.scrollTop = view.scrollHeight;
    shown += lines.length;
    const all = count(run.lines.length);
    where.textContent = all === "0" ? "Nothing yet" : `Events ${count(first + 1)} to ${count(first + shown)} of ${all}`;
    turns.forEach((own) => (own.hidden = last() === 0));
    [turns[0].disabled, turns[1].disabled] = [page === 0, page === last()];
  }

  return { element, draw };
}
