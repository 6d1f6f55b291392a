// /finetune/library: the models, data sets and adapters on the server; uploads and downloads.

import { api } from "./api.js";
import { announce, attempt, button, card, confirm, empty, field, h, input } from "./dom.js";
import { link, notice, picker, select, show, table } from "./dom.js";
import { DATA_NAME, NAME, ROWS, download, sendAll, sendRows } from "./hub.js";
import { fixed, many, sentence, size, tail } from "./text.js";

// The address of a folder as a ZIP file.
export const archive = (kind, path) => `/api/${kind}/archive?${new URLSearchParams({ path })}`;

// A form that pushes a folder to the hub. If the server has no hub token, the form also asks for one.
export async function pushing(path, pushed = () => {}) {
  let { hasToken } = await api("/api/settings/hf-token");
  const problem = h("div", { role: "alert" });
  const result = h("div");
  const token = input("hf_…", { type: "password", autocomplete: "off" });
  const repo = input("me/my-adapter");
  const open = select([["yes", "private"], ["no", "public"]]);
  const about = "It is kept in memory until the server stops, and is never written to a file.";
  const tokenField = field("Hub token", token, { about });
  const push = button("Push", null, "primary");
  tokenField.hidden = hasToken;
  async function submit(event) {
    event.preventDefault();
    show(result, empty("Pushing …"));
    push.disabled = true;
    const done = await attempt(problem, async () => {
      if (!hasToken) {
        await api("/api/settings/hf-token", { token: token.value.trim() });
        [hasToken, tokenField.hidden, token.value] = [true, true, ""];
      }
      const repo_id = repo.value.trim();
      const { url } = await api("/api/finetune/push",
        { repo_id, source_path: path, private: open.value === "yes" });
      show(result, notice(["Pushed: ", link(url, url)], "good"));
      announce("Pushed.");
    });
    if (!done) show(result);
    push.disabled = false;
    pushed();
  }
  return h("form.stack", { novalidate: true, onsubmit: submit },
    h("div.fields", tokenField, field("Repository", repo, { about: "As org/name; it is created if it does not exist." }),
      field("Visibility", open)),
    h("div.actions", push), problem, result);
}

// On a phone, the name of the column precedes the content.
const cell = (name, content) => h("td.tight", { "data-name": name }, content);
const named = (name, path) => h("td.main", name, h("div.muted.small.wrap", path));
const go = (text, what, path, query) =>
  h("a.button.small", { href: `${path}?${new URLSearchParams(query)}`, "aria-label": `${text} ${what}` },
    text);
const get = (kind, path) =>
  h("a.button.small", { href: archive(kind, path), download: "", "aria-label": `Download ${tail(path)}` }, "Download");

export default async function library(main) {
  document.title = "Library – mlx_segtrain";
  const looking = h("p.looking.empty", "Looking for models, data sets and adapters …");
  main.append(h("h1", "Library"), looking);
  const { downloads, uploads } = await api("/api/state");
  let known = []; // models
  const kinds = [
    { kind: "models", title: "Models", rows: models, name: NAME, hub: "model",
      columns: ["Model", "Family", "Parameters", "Size", "Actions"],
      none: "No model below the server's folders. Download one from the hub, or put a model's folder there." },
    { kind: "datasets", title: "Data sets", rows: datasets, name: DATA_NAME, hub: "dataset",
      columns: ["Data set", "Validation", "Size", "Actions"],
      none: "No data set below the server's folders. Upload a file of rows, or download one from the hub." },
    { kind: "adapters", title: "Adapters", rows: adapters,
      columns: ["Adapter", "Base", "Rank", "Best loss", "Size", "Actions"],
      none: "No adapter yet. Train one, or upload one from PEFT or mlx-lm." },
  ];
  const parts = kinds.map((own) => {
    const list = h("div.scroll", { tabindex: 0, role: "region", "aria-label": `List of ${own.kind}` });
    const moved = h("div.stack");
    const problem = h("div", { role: "alert" });
    return { ...own, list, moved, problem };
  });
  looking.remove();
  main.append(...parts.map(section));
  for (const own of parts) await refresh(own); // the models come first

  function section(own) {
    const fails = (act) => async (...args) => {
      show(own.moved);
      const done = await attempt(own.problem, async () => {
        await act(...args);
        await refresh(own);
      });
      if (!done) show(own.moved);
    };
    own.try = fails;
    const name = input("org/name");
    const bring = h("form.row-line", { novalidate: true, onsubmit: (event) => {
      event.preventDefault();
      fails(async () => {
        if (!own.name.test(name.value.trim())) throw new Error("Enter a name on the hub, such as org/name.");
        await download(own.moved, name.value.trim(), own.hub);
      })();
    } }, field("Name on the Hugging Face hub", name), button("Download", null));
    const refused = "The server was started without --allow-downloads, so nothing can be downloaded from the hub.";
    const send = own.kind === "datasets"
      ? picker("Upload rows", fails((files) => sendRows(own.moved, files)),
        { accept: ROWS, several: true })
      : own.kind === "adapters" && picker("Upload an adapter", fails(sendAdapter),
        { accept: ".json,.safetensors", several: true });
    const about = { datasets: "One file of training rows, or two files whose names say which one is for validation.",
      adapters: "Choose adapter_config.json and its .safetensors file together." }[own.kind];
    return card(own.title, own.list,
      send && h("div.row-line", send, h("span.small.muted", about)),
      own.hub && (downloads ? bring : h("p.small.muted", refused)), own.problem, own.moved);

    async function sendAdapter(files) {
      const config = files.find((file) => file.name === "adapter_config.json");
      if (!config || files.length < 2) {
        throw new Error("Choose adapter_config.json and the .safetensors file of the adapter together.");
      }
      const rest = files.filter((file) => file !== config);
      const { base_model_name_or_path: base } = JSON.parse(await config.text());
      const all = [config, ...rest].map((file) => [file, file.name]);
      await sendAll(own.moved, "adapters", `adapter-of-${tail(base) || "upload"}`, all);
    }
  }

  async function refresh(own) {
    const found = await api(`/api/${own.kind}`);
    const rows = found[own.kind];
    known = found.models ?? known;
    const faults = found.faults ?? [];
    const train = own.kind === "adapters" && link("New run", "/finetune");
    show(own.list, rows.length
      ? table("folds.library", own.title, own.columns, rows.map((row) => own.rows(row, own)))
      : [empty(own.none), train],
    faults.map(({ path, error }) => notice(`${path} cannot be read: ${sentence(error)}`, "warn")));
  }

  // Only uploads can be deleted.
  function remove(kind, path, own) {
    if (!path.startsWith(`${uploads}/${kind}/`)) return null;
    const act = own.try(() => api(`/api/${kind}/${tail(path)}`, undefined, { method: "DELETE" }));
    const ask = async () => {
      if (await confirm(`Delete ${tail(path)}?`, `${path} will be deleted from the server.`, "Delete it")) act();
    };
    return h("button.small.danger", { type: "button", "aria-label": `Delete ${tail(path)}`, onclick: ask }, "Delete");
  }

  function models(own) {
    return h("tr", named(own.id, own.path), cell("Family", own.family),
      cell("Parameters", many(own.parameters)), cell("Size", size(own.size_bytes)),
      h("td", h("div.actions.end",
        go("Train", own.id, "/finetune", { model: own.path }),
        go("Chat", own.id, "/finetune/chat", { model: own.path }))));
  }

  function datasets(own, part) {
    return h("tr", named(tail(own.path), own.path), cell("Validation", own.has_valid ? "yes" : "no"),
      cell("Size", size(own.size_bytes)), h("td", h("div.actions.end",
        go("Train", tail(own.path), "/finetune", { data: own.path }), get("datasets", own.path),
        remove("datasets", own.path, part))));
  }

  function adapters(own, part) {
    const place = h("div");
    const open = async () => show(place, place.childElementCount ? null : await pushing(own.path));
    const base = own.base_model ?? "unknown";
    const model = known.find((one) => [one.path, one.id].includes(base));
    return h("tr", h("td.main", tail(own.path), h("div.muted.small.wrap", own.path), place),
      cell("Base", tail(base)), cell("Rank", own.rank || "–"),
      cell("Best loss", fixed(own.best_loss)), cell("Size", size(own.size_bytes)),
      h("td", h("div.actions.end",
        model && go("Chat", tail(own.path), "/finetune/chat", { model: model.path, adapter: own.path }),
        get("adapters", own.path),
        h("button.small", { type: "button", "aria-label": `Push ${tail(own.path)}`, onclick: open }, "Push"),
        remove("adapters", own.path, part))));
  }
}
