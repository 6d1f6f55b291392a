// /finetune/chat: the same prompt to the base and to an adapter, side by side.

import { api, chunks, every } from "./api.js";
import { announce, button, card, combobox, empty, field, h, input, notice, show } from "./dom.js";
import { described } from "./setup.js";
import { counted, fixed, tail } from "./text.js";

// A word for an adapter that none has yet, from its folder's name.
function freeId(path, taken) {
  const name = tail(path).replace(/[^\p{L}\p{N}._-]/gu, "-").slice(0, 100) || "adapter";
  let [id, n] = [name, 1];
  while (taken.includes(id) || id.toLowerCase() === "none") id = `${name}-${++n}`;
  return id;
}

// The id of an adapter of a folder, which is mounted if it is not.
async function mounted(path) {
  const { adapters } = await api("/v1/adapters");
  const found = adapters.find((own) => own.path === path);
  if (found) return found.id;
  const id = freeId(path, adapters.map((own) => own.id));
  return (await api("/v1/adapters", { id, path })).id;
}

export default async function chatPage(main) {
  document.title = "Chat – mlx_segtrain";
  const given = new URLSearchParams(location.search);
  const looking = h("p.looking.empty", "Looking for models …");
  main.append(h("h1", "Chat"), looking);
  let [{ models }, state] = await Promise.all([api("/api/models"), api("/api/state")]);
  looking.remove();
  const sides = [
    { name: "Base", messages: [] },
    { name: "With adapter", messages: [] },
  ];
  let [stopper, loading, shown] = [null, false, ""];

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
  const sampled = { about: "0 takes the likeliest token." };
  main.append(
    card(
      "Who answers",
      h(
        "div.fields.chat",
        field("Model", model),
        field("Adapter", adapter, { about: "Of those on disk that fit the model." }),
        field("Most tokens", most),
        field("Temperature", temperature, sampled),
      ),
      load,
      told,
    ),
    card(
      "Conversation",
      turns,
      h(
        "form.stack",
        { novalidate: true, onsubmit: asked },
        field("Prompt", prompt, { about: "Enter sends, Shift+Enter begins a new line." }),
        problem,
        h("div.actions", send, stop, button("Clear", clear)),
      ),
    ),
  );

  // Model and adapter

  const loaded = () => state.served !== null && state.served.path === model.value;

  async function changed() {
    clear();
    shown = "";
    adapter.offer([]);
    showState();
    if (model.value === null) return;
    const query = new URLSearchParams({ model_dir: model.value });
    const found = await api(`/api/adapters?${query}`).catch(() => ({ adapters: [] }));
    adapter.offer(found.adapters.map(({ path }) => [path, tail(path, 2)]));
    const first = found.adapters[0]?.path;
    adapter.set(adapter.options.has(given.get("adapter")) ? given.get("adapter") : first);
  }

  async function look() {
    state = await api("/api/state");
    showState();
  }

  function showState() {
    const now = JSON.stringify([model.value, loaded(), state.waits, loading]);
    send.disabled = !loaded() || state.waits || stopper !== null;
    stop.hidden = stopper === null;
    if (now === shown) return;
    shown = now;
    show(load, model.value && !loaded() && !loading && button("Load this model", loadModel, "primary"));
    if (loading) show(load, h("span.muted", `Loading ${tail(model.value)} …`));
    show(told, verdict());
  }

  function verdict() {
    if (!models.length) {
      return empty("No model found: put the folder of an MLX model below a root of the server.");
    }
    if (!model.value) return empty("Choose a model to chat with.");
    if (state.waits) return notice("A job computes now: the chat waits until it has ended.", "warn");
    if (loaded() || loading) return null;
    const now = state.served ? `${state.served.id} is loaded, not this model.` : "No model is loaded.";
    return notice(`${now} To load it takes a moment; answers that are being given end first.`);
  }

  async function loadModel() {
    loading = true;
    showState();
    announce("Loading the model.");
    let failed = null;
    try {
      state.served = await api("/api/models/serve", { model_dir: model.value });
    } catch (error) {
      failed = error.message;
    }
    loading = false;
    showState();
    if (failed) told.append(notice(failed, "bad"));
    announce(failed ?? "The model is loaded.");
  }

  // Conversation

  function clear() {
    stopper?.abort();
    sides.forEach((side) => (side.messages = []));
    show(turns, empty("Ask something: the base and the adapter answer side by side."));
  }

  function pressed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    prompt.form.requestSubmit();
  }

  async function asked(event) {
    event.preventDefault();
    const words = prompt.value.trim();
    show(problem);
    if (!words || send.disabled) return;
    const own = (stopper = new AbortController());
    showState();
    try {
      const how = { max_tokens: number(most, 128), temperature: number(temperature, 0) };
      const ids = ["none"];
      if (adapter.value) ids.push(await mounted(adapter.value));
      if (ids[1]) sides[1].name = `With ${ids[1]}`;
      prompt.value = "";
      turns.querySelector(".empty")?.remove();
      const turn = h("div.turn", h("div.asked", words));
      const columns = ids.map((_, i) => column(sides[i].name));
      turn.append(...columns.map(({ element }) => element));
      turns.append(turn);
      prompt.scrollIntoView({ block: "nearest" });
      announce("The models answer.");
      const answers = ids.map((id, i) => answer(words, { ...how, adapter: id }, sides[i], columns[i], own.signal));
      await Promise.all(answers);
      announce("The answers are there.");
    } catch (error) {
      if (error.name !== "AbortError") show(problem, notice(error.message, "bad"));
    } finally {
      if (stopper === own) stopper = null;
      showState();
    }
  }

  function number(control, standard) {
    const value = Number(control.value.trim() || standard);
    if (!Number.isFinite(value)) throw new Error("a setting is no number.");
    return value;
  }

  // One side's answer. A model without a chat template goes on from the text.
  async function answer(words, how, { messages }, { said, note }, signal) {
    messages.push({ role: "user", content: words });
    const path = state.served.chats ? "/v1/chat/completions" : "/v1/completions";
    const of = state.served.chats
      ? { messages: [...messages] }
      : { prompt: messages.map((own) => own.content).join("\n") };
    const began = performance.now();
    let [text, pieces] = ["", 0];
    try {
      const body = { ...of, ...how, stream_options: { include_usage: true } };
      for await (const { choices, usage } of chunks(path, body, signal)) {
        const more = choices[0]?.delta?.content ?? choices[0]?.text ?? "";
        if (more) [text, pieces] = [text + more, pieces + 1];
        said.textContent = text || "…";
        if (!usage) continue;
        const { completion_tokens: made } = usage;
        const speed = made / Math.max((performance.now() - began) / 1000, 1e-6);
        note.textContent = `${counted(made, "token")}, ${fixed(speed, 1)} tokens/s`;
      }
    } catch (error) {
      // A piece is a token or more.
      if (signal.aborted) note.textContent = `stopped after ${counted(pieces, "piece")}`;
      throw error;
    } finally {
      said.textContent = text;
      messages.push({ role: "assistant", content: text });
    }
  }

  const first = given.get("model") ?? state.served?.path;
  model.set(first);
  await changed();
  every(2, look);
}

function column(name) {
  const said = h("div.said", "…");
  const note = h("div.small.muted");
  return { element: h("div.answer", h("div.who.wrap", name), said, note), said, note };
}
