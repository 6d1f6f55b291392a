// The log of a job in pages, since it may have hundreds of thousands of lines.

import { button, card, h } from "./dom.js";
import { count } from "./text.js";

const PAGE = 500;

// A card with a method `draw()`, which adds new lines of the run's log to the newest page.
export function logView(run) {
  let wanted = null; // the number of the wanted page; null is the newest one
  let [page, shown] = [-1, 0]; // the visible page's number, and how many of its lines are shown
  const view = h("div.log", { tabindex: 0, role: "log", "aria-live": "off", "aria-label": "Log" });
  const where = h("span.muted.small");
  const [older, newer] = [button("Older", () => turn(-1)), button("Newer", () => turn(1))];
  const last = () => Math.max(0, Math.ceil(run.lines.length / PAGE) - 1);

  function turn(by) {
    const number = page + by;
    wanted = number >= last() ? null : Math.max(0, number);
    draw();
  }

  function draw() {
    if (page !== (wanted ?? last())) {
      [page, shown] = [wanted ?? last(), 0];
      view.replaceChildren();
    }
    const first = page * PAGE;
    const lines = run.lines.slice(first + shown, first + PAGE);
    const atEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 20;
    view.append(...lines.map(([text, kind]) => h("div", { class: kind }, text || " ")));
    if (atEnd && lines.length) view.scrollTop = view.scrollHeight;
    shown += lines.length;
    const to = `${count(first + shown)} of ${count(run.lines.length)}`;
    where.textContent = shown ? `Events ${count(first + 1)} to ${to}` : "Nothing yet";
    older.hidden = newer.hidden = last() === 0;
    [older.disabled, newer.disabled] = [page === 0, page === last()];
  }

  return { element: card("Log", view, h("div.actions", where, older, newer)), draw };
}
