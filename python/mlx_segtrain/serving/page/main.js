// What every page has, header and theme, and which page an address is.

import { api, every } from "./api.js";
import { icon, notice } from "./dom.js";
import { percent } from "./text.js";

const PAGES = { "": "setup", jobs: "jobs", job: "job", chat: "chat" };
const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const main = document.getElementById("content");
const theme = document.getElementById("theme");
const logout = document.getElementById("logout");

function showTheme() {
  const name = document.documentElement.dataset.theme;
  theme.title = `Theme: ${THEMES[name]}`;
  theme.setAttribute("aria-label", theme.title);
  theme.replaceChildren(icon(name));
}

// Goes round system, light, dark.
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const root = document.documentElement.dataset;
  root.theme = names[(names.indexOf(root.theme) + 1) % names.length];
  localStorage.setItem("theme", root.theme);
  showTheme();
});

// The job that computes now, on every page.
async function showState() {
  const { running, waiting, needs_token } = await api("/api/state");
  logout.hidden = !needs_token;
  const now = document.querySelector(".now");
  now.hidden = running.length === 0;
  if (now.hidden) return;
  const [{ id, title, progress }] = running;
  const more = waiting ? `, ${waiting} waiting` : "";
  now.href = `/finetune/job/${id}`;
  now.lastChild.textContent = `${title} ${percent(progress)}${more}`;
}

showTheme();
logout.firstElementChild.append(icon("logout"));
document.querySelector(`nav a[href="${CSS.escape(location.pathname)}"]`)
  ?.setAttribute("aria-current", "page");
every(2, showState)();
const [, , name = "", id = ""] = location.pathname.split("/");
try {
  const page = await import(`./${PAGES[name]}.js`);
  await page.default(main, decodeURIComponent(id));
} catch (error) {
  main.querySelector(".looking")?.remove();
  main.append(notice(error.message, "bad", { role: "alert" }));
  throw error;
}
