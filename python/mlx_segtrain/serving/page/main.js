// What every page has, header and theme, and which page an address is.

import { api, every } from "./api.js";
import { icon, notice } from "./dom.js";
import { percent } from "./text.js";

const PAGES = [
  [/^\/finetune\/?$/, "setup"],
  [/^\/finetune\/jobs$/, "jobs"],
  [/^\/finetune\/job\/([^/]+)$/, "job"],
  [/^\/finetune\/chat$/, "chat"],
];
const THEMES = { auto: "as the system", light: "light", dark: "dark" };

// Goes round system, light, dark.
function turnTheme() {
  const root = document.documentElement.dataset;
  const names = Object.keys(THEMES);
  root.theme = names[(names.indexOf(root.theme) + 1) % names.length];
  localStorage.setItem("theme", root.theme);
  showTheme();
}

function showTheme() {
  const name = document.documentElement.dataset.theme;
  const button = document.getElementById("theme");
  button.title = `Theme: ${THEMES[name]}`;
  button.setAttribute("aria-label", button.title);
  button.replaceChildren(icon(name));
}

// The job that computes now, on every page.
async function showState() {
  const { running, waiting, needs_token } = await api("/api/state");
  document.getElementById("logout").hidden = !needs_token;
  const now = document.querySelector(".now");
  now.hidden = running.length === 0;
  if (running.length) {
    const [{ id, title, progress }] = running;
    now.href = `/finetune/job/${id}`;
    now.lastChild.textContent = `${title} ${percent(progress)}${waiting ? `, ${waiting} waiting` : ""}`;
  }
}

async function open() {
  const main = document.getElementById("content");
  for (const own of document.querySelectorAll("nav a")) {
    if (own.pathname === location.pathname) own.setAttribute("aria-current", "page");
  }
  document.getElementById("theme").addEventListener("click", turnTheme);
  document.querySelector("#logout button").append(icon("logout"));
  showTheme();
  every(2, showState)();
  for (const [address, name] of PAGES) {
    const found = address.exec(location.pathname);
    if (!found) continue;
    try {
      const module = await import(`./${name}.js`);
      await module.default(main, found[1] && decodeURIComponent(found[1]));
    } catch (error) {
      main.querySelector(".looking")?.remove();
      main.append(notice(error.message, "bad", { role: "alert" }));
      throw error;
    }
  }
}

open();
