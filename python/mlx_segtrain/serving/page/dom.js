// Creates elements and parts of pages. Everything from the server or a model is inserted as text, never as HTML.

import { sentence } from "./text.js";

// Milliseconds after the last key until a search starts.
const TYPED = 400;

// Creates an element: h("div.card", { id: "x", onclick: f }, "text", other, …). The properties are
// optional; null and false are skipped.
export function h(name, ...content) {
  const [tag, ...classes] = name.split(".").filter(Boolean);
  const props = content[0]?.constructor === Object ? content.shift() : {};
  const made = document.createElement(tag);
  if (classes.length) made.classList.add(...classes);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(key, value);
    else if (value != null) made.setAttribute(key, value);
  }
  made.append(...content.flat(Infinity).filter((part) => part != null && part !== false));
  return made;
}

// Creates an SVG element.
export function s(name, attributes, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}

// Replaces the content of an element.
export const show = (place, ...content) =>
  place.replaceChildren(...content.flat(Infinity).filter(Boolean));

// Tells users of screen readers what has changed.
export const announce = (content) => (document.getElementById("said").textContent = content);

let count = 0;
const unique = (word) => `${word}-${++count}`;

// SVG paths in a square of 24 × 24.
const CIRCLE = "M3 12a9 9 0 1 0 18 0a9 9 0 1 0-18 0";
const ICONS = {
  queued: `${CIRCLE}M12 7v5l3 3`,
  running: "M20 12a8 8 0 1 1-3-6.2M17 2v4h-4",
  done: `${CIRCLE}M8 12l3 3l5-6`,
  failed: `${CIRCLE}M12 7v6M12 16v1`,
  cancelled: `${CIRCLE}M9 9l6 6M15 9l-6 6`,
  info: `${CIRCLE}M12 11v6M12 7v1`,
  warn: "M12 3L2 20h20zM12 9v6M12 17v1",
  auto: `${CIRCLE}M12 3v18M12 6h6M12 10h8M12 14h8M12 18h6`,
  light: "M8 12a4 4 0 1 0 8 0a4 4 0 1 0-8 0M12 1v4M12 19v4M1 12h4M19 12h4M4 4l3 3M17 17l3 3",
  dark: "M20 14A8.5 8.5 0 1 1 10 4A7 7 0 0 0 20 14",
  bell: "M6 16V11a6 6 0 1 1 12 0v5l2 2H4zM10 20a2 2 0 0 0 4 0",
  muted: "M6 16V11a6 6 0 1 1 12 0v5l2 2H4zM10 20a2 2 0 0 0 4 0M3 3l18 18",
  logout: "M14 3H4v18h10M9 12h12M17 8l4 4l-4 4",
};
export const icon = (name) =>
  s("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": true },
    s("path", { d: ICONS[name] }));

export const button = (content, onclick, kind = "") =>
  h(`button.${kind}`, onclick ? { type: "button", onclick } : { type: "submit" }, content);

export const link = (content, href) => h("a.link", { href }, content);

// Says what to do about an empty list, with buttons.
export const empty = (content, ...actions) => (actions.length
  ? h("div.stack", h("p.empty", content), h("div.actions", actions))
  : h("p.empty", content));

// A button for choosing files with these extensions; `take` receives the files.
export function picker(content, take, { accept = "", several = false } = {}) {
  const input = h("input", { type: "file", accept, multiple: several, hidden: true,
    "aria-label": content, tabindex: -1, onchange: () => {
      const chosen = [...input.files];
      input.value = "";
      if (chosen.length) take(chosen);
    } });
  return h("span.picker", input, button(content, () => input.click()));
}

// Scrolls to an element and focuses it.
export function reveal(element, focus = element) {
  element.closest("details:not([open])")?.setAttribute("open", "");
  element.scrollIntoView({ block: "center" });
  focus.focus({ preventScroll: true });
}

// Shows a sentence at the edge of the page for a while.
export function toast(content, href) {
  const place = document.getElementById("toasts");
  const own = h("div.toast", href ? link(content, href) : h("span", content),
    h("button.icon-only", { type: "button", "aria-label": "Close", onclick: () => own.remove() }, "×"));
  place.append(own);
  setTimeout(() => own.remove(), 15_000);
}

// A section with its heading.
export function card(title, ...content) {
  const heading = title ? h("h2", { id: unique("heading") }, title) : null;
  return h("section.card", { "aria-labelledby": heading?.id }, heading, content);
}

// Pairs of names and values.
export const facts = (kind, pairs) =>
  h(`dl.facts.${kind}`, pairs.map(([name, value]) => h("div", h("dt", name), h("dd", value))));

// A job's status as a word, an icon and a colour.
export const badge = (status) => h(`span.badge.${status}`, icon(status), h("span", status));

// A sentence in a box; `kind` is good, warn, bad or empty.
export function notice(content, kind = "", props = {}) {
  const icons = { good: "done", warn: "warn", bad: "failed", "": "info" };
  return h(`div.notice.${kind}`, props, icon(icons[kind]), h("p", content));
}

// A bar that is filled up to a fraction.
export function meter(share, props) {
  const filled = h("div.filled");
  filled.style.width = `${100 * Math.min(1, share)}%`;
  return h("div.meter", props, filled);
}

// A table with named columns.
export const table = (kind, caption, names, rows) =>
  h(`table.list.${kind}`, h("caption.sr-only", caption),
    h("thead", h("tr", names.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", rows));

// A section that can be opened; only one section of a group is open at a time.
export const expansion = (title, caption, content, group = null) =>
  h("details", { name: group },
    h("summary", { role: "button" }, h("span", title), h("span.small.muted", caption)), content);

// Runs an action; if it throws, shows the error in an element. Returns whether the action succeeded.
export async function attempt(problem, act) {
  show(problem);
  try {
    await act();
  } catch (error) {
    show(problem, notice(sentence(error.message), "bad"));
    return false;
  }
  return true;
}

// Opens a dialog, which is removed when it is closed.
function modal(title, ...content) {
  const id = unique("dialog");
  const own = h("dialog.card", { "aria-labelledby": id, onclose: () => own.remove() },
    h("h2", { id }, title), content);
  document.body.append(own);
  own.showModal();
  return own;
}

// Opens a dialog with a form; `save` may throw an error, which is shown.
export function dialog(title, fields, action, save) {
  const problem = h("div", { role: "alert" });
  const submit = async (event) => {
    event.preventDefault();
    if (await attempt(problem, save)) own.close();
  };
  const own = modal(title, h("form.stack", { novalidate: true, onsubmit: submit }, fields, problem,
    h("div.actions.end", button("Cancel", () => own.close()), button(action, null, "primary"))));
}

// Asks for confirmation before an action that cannot be undone.
export function confirm(question, detail, action) {
  const own = modal(question, h("p", detail), h("div.actions.end",
    button("Keep it", () => own.close()),
    button(action, () => own.close("yes"), "danger")));
  return new Promise((answer) => {
    own.addEventListener("close", () => answer(own.returnValue === "yes"));
  });
}

// A control with label, help and error. The control is an element, or an object with an `element` and
// the `input` to label.
export function labelled(label, control, { about, key, kind = "" } = {}) {
  const input = control.input ?? control;
  input.id ||= unique("control");
  const help = about && h("div.about", { id: unique("about") }, about);
  const wrong = h("div.wrong", { id: unique("wrong") });
  input.setAttribute("aria-describedby", `${wrong.id} ${help?.id ?? ""}`);
  const element = h(`div.field.${kind}`,
    h("div.name", h("label", { for: input.id, title: key }, label),
      key && h("span.mono", { "aria-hidden": "true" }, key)),
    control.element ?? control, wrong, help);
  const complain = (...content) => {
    const some = content.flat().filter(Boolean);
    wrong.replaceChildren(...some);
    element.classList.toggle("invalid", some.length > 0);
    input.setAttribute("aria-invalid", some.length > 0);
  };
  return { element, complain, reveal: () => reveal(element, input) };
}

export const field = (...how) => labelled(...how).element;

export const input = (placeholder, props) =>
  h("input", { placeholder, autocomplete: "off", ...props });

// A menu of options: pairs of value and text.
export const select = (pairs, onchange = () => {}) =>
  h("select", { onchange }, pairs.map(([value, text]) => h("option", { value }, text)));

// An input with a list of options, filtered by the typed words. `value` is null if no option is chosen. A text that
// matches `takes` can also be chosen; `called` describes it. `seek` returns more options for the typed words, shortly
// after the last key; its errors are shown below the input.
export function combobox(onchange = () => {}, takes = /(?!)/, called = () => "", seek = null) {
  const list = h("ul.options", { role: "listbox", id: unique("list"), hidden: true,
    onmousedown: (event) => event.preventDefault() }); // the focus stays
  const input = h("input", { type: "search", role: "combobox", autocomplete: "off",
    "aria-autocomplete": "list", "aria-controls": list.id, "aria-expanded": "false",
    onclick: () => list.hidden && open(),
    oninput: () => open(input.value),
    onblur: left,
    onkeydown: press });
  const told = h("div.small.muted", { role: "status" });
  const self = { input, element: h("div.combobox", input, list, told), value: null, options: new Map() };
  let [found, active] = [[], 0];
  let [timer, sought] = [null, ["", []]]; // words, and the options that were found for them

  self.set = (value) => {
    self.value = self.options.has(value) || takes.test(value ?? "") ? value : null;
    close();
  };
  self.offer = (pairs) => {
    self.options = new Map(pairs);
    self.set(self.value);
  };
  function close() {
    clearTimeout(timer);
    told.textContent = "";
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
    input.value = self.options.get(self.value) ?? self.value ?? "";
  }
  function left() {
    const words = input.value.trim();
    if (words === "" || takes.test(words)) choose(words || null);
    else close();
  }
  function choose(value) {
    const before = self.value;
    self.set(value);
    if (before !== self.value) onchange();
  }
  function open(words = null) {
    const has = ([, text]) => text.toLowerCase().includes(words.toLowerCase());
    found = [...self.options].filter((own) => words === null || has(own));
    const typed = (words ?? "").trim();
    if (takes.test(typed)) found.push([typed, `${typed} · ${called(typed)}`]);
    if (typed && typed === sought[0]) {
      const known = new Set(found.map(([value]) => value));
      found.push(...sought[1].filter(([value]) => !known.has(value)));
    } else later(typed);
    show(list, found.map(([value, text], i) =>
      h("li", { role: "option", id: `${list.id}-${i}`, onclick: () => choose(value) }, text)));
    list.hidden = found.length === 0;
    input.setAttribute("aria-expanded", !list.hidden);
    if (words === null) input.select();
    mark(Math.max(0, found.findIndex(([value]) => value === self.value)));
  }
  // Searches when the user pauses; drops the results if other words have been typed meanwhile.
  function later(words) {
    clearTimeout(timer);
    told.textContent = "";
    if (!seek || words.length < 2) return;
    timer = setTimeout(async () => {
      const current = () => document.activeElement === input && input.value.trim() === words;
      try {
        sought = [words, await seek(words)];
        if (current()) open(input.value);
      } catch (error) {
        if (current()) told.textContent = sentence(error.message);
      }
    }, TYPED);
  }
  function mark(place) {
    if (!found.length) return;
    active = (place + found.length) % found.length;
    [...list.children].forEach((own, i) => own.setAttribute("aria-selected", i === active));
    list.children[active].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", list.children[active].id);
  }
  function press(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape" && !list.hidden) close();
    else if ((step || event.key === "Enter") && list.hidden) open();
    else if (step) mark(active + step);
    else if (event.key === "Enter") choose(found[active][0]);
    else return;
    event.preventDefault();
  }
  return self;
}
