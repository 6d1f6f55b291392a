// /finetune/chat: the same prompt to the base and to an adapter, side by side.

import { api, chunks, every } from "./api.js";
import { announce, button, card, combobox, empty } from "./dom.js";
import { field, h, input, notice, show } from "./dom.js";
import { described } from "./setup.js";
import { counted, fixed, tail } from "./text.js";

const ASK = "Ask something: the base and the adapter answer side by side.";
const NO_MODEL = "No model found: put the folder of an MLX model below a root of the server.";
const WAITS = "A job computes now: the chat waits until it has ended.";

// The id of the adapter in a folder, which is mounted if it is not.
async function mounted(path) {
  const { adapters } = await api("/v1/adapters");
  const taken = adapters.map((own) => own.id);
  const name = tail(path).replace(/[^\p{L}\p{N}._-]/gu, "-").slice(0, 100) || "adapter";
  let [id, n] = [name, 1];
  while (taken.includes(id) || id.toLowerCase() === "none") id = `${name}-${++n}`;
  const own = adapters.find((own) => own.path === path);
  return (own ?? (await api("/v1/adapters", { id, path }))).id;
}

export default async function chatPage(main) {
  document.title = "Chat – mlx_segtrain";
  const given = new URLSearchParams(location.search);
  const looking = h("p.looking.empty", "Looking for models …");
  main.append(h("h1", "Chat"), looking);
  let [{ models }, state] = await Promise.all([api("/api/models"), api("/api/state")]);
  looking.remove();
  let messages = [[], []]; // of the base, and of the adapter
  let stopper = null; // while they answer
  let [loading, shown] = [false, ""];

  const model = combobox(changed);
  model.offer(models.map((own) => [own.path, described(own)]));
  const adapter = combobox();
  const most = input("128", { inputmode: "decimal" });
  const temperature = input("0", { inputmode: "decimal" });
  const load = h("div.actions");
  const told = h("div", { "aria-live": "polite" });
  const turns = h("div.stack");
  const prompt = h("textarea", { rows: 2, onkeydown: pressed });
  const problem = h("div", { role: "alert" });
  const send = button("Send", null, "primary");
  const stop = button("Stop", () => stopper?.abort(), "danger");
  main.append(
    card("Who answers",
      h("div.fields.chat",
        field("Model", model),
        field("Adapter", adapter, { about: "Of those on disk that fit the model." }),
        field("Most tokens", most),
        field("Temperature", temperature, { about: "0 takes the likeliest token." })),
      load, told),
    card("Conversation", turns,
      h("form.stack", { novalidate: true, onsubmit: ask },
        field("Prompt", prompt, { about: "Enter sends, Shift+Enter begins a new line." }),
        problem,
        h("div.actions", send, stop, button("Clear", clear)))));

  // Model and adapter

  const loaded = () => state.served !== null && state.served.path === model.value;

  async function changed() {
    clear();
    adapter.offer([]);
    showState();
    if (model.value === null) return;
    const query = new URLSearchParams({ model_dir: model.value });
    const { adapters } = await api(`/api/adapters?${query}`).catch(() => ({ adapters: [] }));
    adapter.offer(adapters.map(({ path }) => [path, tail(path, 2)]));
    adapter.set(given.get("adapter"));
    if (adapter.value === null) adapter.set(adapters[0]?.path);
  }

  async function look() {
    state = await api("/api/state");
    showState();
  }

  function showState() {
    send.disabled = !loaded() || state.waits || stopper !== null;
    stop.hidden = stopper === null;
    const now = JSON.stringify([model.value, loaded(), state.waits, loading]);
    if (now === shown) return;
    shown = now;
    const want = model.value && !loaded() && button("Load this model", loadModel, "primary");
    show(load, loading ? h("span.muted", `Loading ${tail(model.value)} …`) : want);
    const id = state.served?.id;
    const base = id ? `${id} is loaded, not this model.` : "No model is loaded.";
    const swap = `${base} To load it takes a moment; answers that are being given end first.`;
    if (!models.length) show(told, empty(NO_MODEL));
    else if (!model.value) show(told, empty("Choose a model to chat with."));
    else if (state.waits) show(told, notice(WAITS, "warn"));
    else show(told, !loaded() && !loading && notice(swap));
  }

  async function loadModel() {
    loading = true;
    showState();
    announce("Loading the model.");
    let failure = null;
    try {
      state.served = await api("/api/models/serve", { model_dir: model.value });
    } catch (error) {
      failure = error.message;
    }
    loading = false;
    showState();
    if (failure) told.append(notice(failure, "bad"));
    announce(failure ?? "The model is loaded.");
  }

  // Conversation

  function clear() {
    stopper?.abort();
    messages = [[], []];
    show(turns, empty(ASK));
  }

  function pressed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    prompt.form.requestSubmit();
  }

  const number = (control, standard) => {
    const value = Number(control.value.trim() || standard);
    if (!Number.isFinite(value)) throw new Error("a setting is no number.");
    return value;
  };

  async function ask(event) {
    event.preventDefault();
    const words = prompt.value.trim();
    show(problem);
    if (!words || send.disabled) return;
    const { signal } = (stopper = new AbortController());
    showState();
    try {
      const how = { max_tokens: number(most, 128), temperature: number(temperature, 0) };
      const ids = ["none"];
      if (adapter.value) ids.push(await mounted(adapter.value));
      prompt.value = "";
      const names = ids.map((id, i) => (i ? `With ${id}` : "Base"));
      const sides = names.map((name) => [name, h("div.said", "…"), h("div.small.muted")]);
      turns.querySelector(".empty")?.remove();
      turns.append(h("div.turn", h("div.asked", words),
        sides.map(([name, ...parts]) => h("div.answer", h("div.who.wrap", name), parts))));
      prompt.scrollIntoView({ block: "nearest" });
      announce("The models answer.");
      await Promise.all(ids.map((adapter, i) =>
        answer(words, { ...how, adapter }, messages[i], sides[i], signal)));
      announce("The answers are there.");
    } catch (error) {
      if (!signal.aborted) show(problem, notice(error.message, "bad"));
    } finally {
      if (stopper?.signal === signal) stopper = null;
      showState();
    }
  }

  // One side's answer. A model without a chat template goes on from the text.
  async function answer(words, how, said, [, text, note], signal) {
    said.push({ role: "user", content: words });
    const { chats } = state.served;
    const prompt = said.map(({ content }) => content).join("\n");
    const asked = chats ? { messages: [...said] } : { prompt };
    const path = chats ? "/v1/chat/completions" : "/v1/completions";
    const body = { ...asked, ...how, stream_options: { include_usage: true } };
    const began = performance.now();
    let [whole, pieces] = ["", 0];
    try {
      for await (const { choices, usage } of chunks(path, body, signal)) {
        const more = choices[0]?.delta?.content ?? choices[0]?.text ?? "";
        if (more) [whole, pieces] = [whole + more, pieces + 1];
        text.textContent = whole || "…";
        if (!usage) continue;
        const { completion_tokens: made } = usage;
        const speed = (1000 * made) / (performance.now() - began);
        note.textContent = `${counted(made, "token")}, ${fixed(speed, 1)} tokens/s`;
      }
    } catch (error) {
      // A piece is the text of a token or more.
      if (signal.aborted) note.textContent = `stopped after ${counted(pieces, "piece")}`;
      throw error;
    } finally {
      text.textContent = whole;
      said.push({ role: "assistant", content: whole });
    }
  }

  model.set(given.get("model") ?? state.served?.path);
  await changed();
  every(2, look);
}
