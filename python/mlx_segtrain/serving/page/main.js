// Sets up the header and the theme of every page, and loads the module for the page's address.

import { api, every } from "./api.js";
import { announce, icon, notice, toast } from "./dom.js";
import { ended } from "./results.js";
import { percent } from "./text.js";

const PAGES = { "": "setup", jobs: "jobs", job: "job", library: "library", chat: "chat" };
const THEMES = { auto: "same as the system", light: "light", dark: "dark" };
const main = document.getElementById("content");
const theme = document.getElementById("theme");
const bell = document.getElementById("bell");
const logout = document.getElementById("logout");

function showTheme() {
  const name = document.documentElement.dataset.theme;
  theme.title = `Theme: ${THEMES[name]}`;
  theme.setAttribute("aria-label", theme.title);
  theme.replaceChildren(icon(name));
}

// Switches between system, light and dark.
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const root = document.documentElement.dataset;
  root.theme = names[(names.indexOf(root.theme) + 1) % names.length];
  localStorage.setItem("theme", root.theme);
  showTheme();
});

// Returns whether notifications are on and allowed.
const wanted = () =>
  localStorage.getItem("bell") === "on" && globalThis.Notification?.permission === "granted";

function showBell() {
  const on = wanted();
  bell.title = on ? "Notifications are on: the browser reports when a job ends" : "Notify me when a job ends";
  bell.setAttribute("aria-label", bell.title);
  bell.setAttribute("aria-pressed", on);
  bell.replaceChildren(icon(on ? "bell" : "muted"));
}

bell.addEventListener("click", async () => {
  const on = wanted();
  if (!on && (await globalThis.Notification?.requestPermission()) !== "granted") {
    toast("The browser does not allow notifications for this address.");
  } else {
    localStorage.setItem("bell", on ? "off" : "on");
    announce(on ? "Notifications are off." : "Notifications are on.");
  }
  showBell();
});

// Reports that a job has ended, unless its page is visible.
async function tellEnd(id) {
  const { job } = await api(`/api/jobs/${id}`);
  const here = location.pathname === `/finetune/job/${id}`;
  if (!ended(job) || (here && !document.hidden)) return;
  const said = `${job.title} ${job.status}: ${job.name}`;
  if (!here) toast(said, `/finetune/job/${id}`);
  if (!wanted() || !document.hidden) return;
  // With a tag, the browser shows only one notification even if several pages are open.
  const told = new Notification(said, { tag: id, body: job.error ?? "" });
  told.onclick = () => (window.focus(), location.assign(`/finetune/job/${id}`));
}

// Shows the running job, and reports jobs that have ended since the last call.
let before = [];
async function showState() {
  if (document.hidden && !wanted()) return;
  const { running, waiting, needs_token } = await api("/api/state");
  const ids = running.map(({ id }) => id);
  before.filter((id) => !ids.includes(id)).forEach((id) => tellEnd(id).catch(() => {}));
  before = ids;
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
showBell();
every(2, showState, { unseen: true })();
const [, , name = "", id = ""] = location.pathname.split("/");
try {
  const page = await import(`./${PAGES[name]}.js`);
  await page.default(main, decodeURIComponent(id));
} catch (error) {
  main.querySelector(".looking")?.remove();
  main.append(notice(error.message, "bad", { role: "alert" }));
  throw error;
}
