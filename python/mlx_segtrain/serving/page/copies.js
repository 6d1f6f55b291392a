// Copies a run to the clipboard as a command, a YAML file or a Python program.

import { api } from "./api.js";
import { announce, attempt, button, h, show } from "./dom.js";

const FORMS = { command: "Command", yaml: "YAML", python: "Python" };

// Returns the buttons; `values` returns the current configuration.
export function copies(values) {
  const problem = h("div", { role: "alert" });
  const shown = h("div");
  const copy = (name) => attempt(problem, async () => {
    show(shown);
    const given = Object.entries(values()).filter(([, value]) => value !== null);
    const text = (await api("/api/finetune/copy", Object.fromEntries(given)))[name];
    const own = h("textarea.mono", { readonly: true, rows: 6, "aria-label": FORMS[name] });
    own.value = text;
    show(shown, own);
    await navigator.clipboard?.writeText(text).catch(() => own.select());
    announce(`${FORMS[name]} copied.`);
  });
  return h("div.stack.copies",
    h("div.actions", { role: "group", "aria-label": "Copy the run as" },
      h("span.small.muted", "Copy as"),
      Object.entries(FORMS).map(([name, title]) => button(title, () => copy(name), "small"))),
    problem, shown);
}
