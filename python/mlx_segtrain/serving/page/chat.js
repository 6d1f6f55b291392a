// /finetune/chat: sends each prompt to two sides. A side is the base model or an adapter.

import { api, chunks, every } from "./api.js";
import { announce, button, card, combobox, empty, expansion } from "./dom.js";
import { field, h, input, labelled, link, notice, select, show } from "./dom.js";
import { counted, described, fixed, sentence, tail } from "./text.js";

const ASK = "Ask something: both sides will answer.";
const WAITS = "A job is running: the chat waits until it ends.";
const BASE = "none"; // the id for the base model
const NOBODY = ""; // the value of a side that does not answer
// The key of the chat in local storage, and the maximum number of turns that are stored.
const PLACE = "mlx-segtrain chat";
const KEPT = 50;
// Sampling options: name, title, default and help.
const SAMPLING = [
  ["temperature", "Temperature", "0", "0 is greedy decoding."],
  ["max_tokens", "Max tokens", "256", "Maximum length of an answer."],
  ["top_p", "Top p", "1", "Samples from the most likely tokens that together have this probability."],
  ["top_k", "Top k", "0", "Samples from this many of the most likely tokens; 0: from all."],
  ["min_p", "Min p", "0", "Leaves out tokens whose probability is below this fraction of the most likely token's."],
  ["repetition_penalty", "Repetition penalty", "1", "Values above 1 make repetition less likely."],
  ["seed", "Seed", "", "The same seed gives the same answer."],
];

// Mounts the adapter in a folder, unless it is mounted and its files have not changed, and returns its id.
async function mounted(path) {
  return path === BASE ? BASE : (await api("/v1/adapters", { path })).id;
}

const titleOf = (side) => (side === BASE ? "Base" : tail(side));

// Returns the stored chat; turns are { asked, answers: [[side, text, note], …] }.
function kept() {
  try {
    return JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}

export default async function chatPage(main) {
  document.title = "Chat – mlx_segtrain";
  const given = new URLSearchParams(location.search);
  const looking = h("p.looking.empty", "Looking for models …");
  main.append(h("h1", "Chat"), looking);
  let [{ models }, state] = await Promise.all([api("/api/models"), api("/api/state")]);
  looking.remove();
  const old = kept();
  let turns = [];
  let stopper = null; // an AbortController while the sides answer
  let [loading, shown] = [false, ""];

  const model = combobox(() => changed());
  model.offer(models.map((own) => [own.path, described(own)]));
  const sides = [0, 1].map(() => select([], keep));
  const system = h("textarea", { rows: 2, oninput: keep });
  const sampling = SAMPLING.map(([name, title, standard, about]) => {
    const own = input(standard || "any", { inputmode: "decimal", oninput: () => (part.complain(), keep()) });
    const part = labelled(title, own, { about, key: name });
    return { name, own, ...part };
  });
  const load = h("div.actions");
  const told = h("div", { "aria-live": "polite" });
  const list = h("div.stack", { role: "log", "aria-live": "off", "aria-label": "Conversation" });
  const prompt = h("textarea", { rows: 2, onkeydown: pressed });
  const problem = h("div", { role: "alert" });
  const send = button("Send", null, "primary");
  const stop = button("Stop", () => stopper?.abort(), "danger");
  const again = button("Ask again", () => askAgain());
  main.append(
    card("Model and adapters",
      h("div.fields.chat",
        field("Model", model),
        field("Left", sides[0]),
        field("Right", sides[1])),
      load, told,
      expansion("System prompt and sampling", "temperature, max tokens, top p, …", h("div.stack",
        field("System prompt", system, { about: "If empty, the chat template's default is used, if it has one." }),
        h("div.fields", sampling.map((own) => own.element))))),
    card("Conversation", list,
      h("form.stack", { novalidate: true, onsubmit: ask },
        field("Prompt", prompt, { about: "Enter sends the prompt, Shift+Enter starts a new line." }),
        problem,
        h("div.actions", send, stop, again, button("Clear", clear)))));

  // Storage

  function keep() {
    const set = Object.fromEntries(sampling.map(({ name, own }) => [name, own.value]));
    const [left, right] = sides.map((own) => own.value);
    const own = { model: model.value, left, right, system: system.value, set,
      turns: turns.slice(-KEPT).map(({ asked, answers }) => ({ asked, answers })) };
    try {
      localStorage.setItem(PLACE, JSON.stringify(own));
    } catch { // the storage is full or disabled
      localStorage.removeItem(PLACE);
    }
  }

  // Model and adapters

  const loaded = () => state.served !== null && state.served.path === model.value;

  async function changed({ left, right } = {}) {
    stopper?.abort();
    turns = [];
    offer([]);
    showTurns();
    showState();
    if (model.value === null) return;
    const query = new URLSearchParams({ model_dir: model.value });
    const { adapters } = await api(`/api/adapters?${query}`).catch(() => ({ adapters: [] }));
    offer(adapters.map(({ path }) => path));
    const last = adapters.at(-1)?.path;
    choose(sides[0], left ?? BASE);
    choose(sides[1], right ?? last ?? NOBODY);
    keep();
  }

  function offer(paths) {
    const all = [[BASE, "Base, without an adapter"], ...paths.map((path) => [path, tail(path, 2)])];
    sides.forEach((own, i) => {
      const before = own.value;
      const none = i ? [[NOBODY, "None: one answer"]] : [];
      own.replaceChildren(...select([...all, ...none]).children);
      choose(own, before);
    });
  }

  const choose = (own, value) => {
    own.value = value;
    if (own.selectedIndex < 0) own.selectedIndex = 0;
  };

  async function look() {
    state = await api("/api/state");
    showState();
  }

  function showState() {
    send.disabled = !loaded() || state.waits || stopper !== null;
    again.disabled = send.disabled;
    again.hidden = !turns.length;
    stop.hidden = stopper === null;
    const now = JSON.stringify([model.value, loaded(), state.waits, loading]);
    if (now === shown) return;
    shown = now;
    const want = model.value && !loaded() && button("Load this model", loadModel, "primary");
    show(load, loading ? h("span.muted", `Loading ${tail(model.value)} …`) : want);
    const id = state.served?.id;
    const base = id ? `${id} is loaded, not this model.` : "No model is loaded.";
    const swap = `${base} Loading takes a moment, and starts when answers in progress have ended.`;
    const none = "No model found: put the folder of an MLX model below a root of the server.";
    if (!models.length) show(told, empty(none, link("Library", "/finetune/library")));
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
    if (failure) told.append(notice(sentence(failure), "bad"));
    announce(failure ?? "The model is loaded.");
  }

  // Conversation

  function clear() {
    stopper?.abort();
    turns = [];
    showTurns();
    showState();
    keep();
  }

  function showTurns() {
    show(list, turns.length ? turns.map(shownTurn) : empty(ASK));
  }

  function shownTurn(turn) {
    turn.places = turn.answers.map(([, text, note]) => [h("div.said", text), h("div.small.muted", note)]);
    return h("div.turn", h("div.asked", turn.asked), turn.answers.map(([side], i) =>
      h("div.answer", h("div.who.wrap", titleOf(side)), turn.places[i])));
  }

  function pressed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    prompt.form.requestSubmit();
  }

  // Returns the sampling options for the API. Shows an error at its field, and throws.
  function settings() {
    const own = { max_tokens: 256, temperature: 0 };
    for (const { name, own: control, complain, reveal } of sampling) {
      const text = control.value.trim();
      if (!text) continue;
      own[name] = Number(text);
      if (Number.isFinite(own[name])) continue;
      complain("Enter a number.");
      reveal();
      throw new Error("");
    }
    return own;
  }

  async function ask(event) {
    event.preventDefault();
    const words = prompt.value.trim();
    if (!words || send.disabled) return;
    if (await answerTo(words)) prompt.value = "";
  }

  // Sends the last prompt again, with the current sides and settings.
  async function askAgain() {
    const last = turns.pop();
    showTurns();
    if (!(await answerTo(last.asked))) turns.push(last);
    showTurns();
    showState();
  }

  // Sends a prompt to both sides; returns whether it was sent.
  async function answerTo(words) {
    show(problem);
    const { signal } = (stopper = new AbortController());
    showState();
    let turn = null;
    try {
      const how = settings();
      const wanted = [...new Set(sides.map((own) => own.value).filter((own) => own !== NOBODY))];
      const ids = [];
      for (const side of wanted) ids.push(await mounted(side)); // one at a time, because two may have the same name
      const earlier = wanted.map((side) => earlierWith(side));
      turn = { asked: words, answers: wanted.map((side) => [side, "…", ""]) };
      turns.push(turn);
      show(list, turns.map(shownTurn));
      prompt.scrollIntoView({ block: "nearest" });
      announce("The models are answering.");
      await Promise.all(ids.map((adapter, i) =>
        answer(turn, i, earlier[i], { ...how, adapter }, signal)));
      announce("Responses ready.");
    } catch (error) {
      if (!signal.aborted && error.message) show(problem, notice(sentence(error.message), "bad"));
    } finally {
      if (stopper?.signal === signal) stopper = null;
      showState();
      keep();
    }
    return turn !== null;
  }

  // Returns the conversation so far for a side: its own answers or, where it has none, those of the other side.
  const earlierWith = (side) => turns.flatMap(({ asked, answers }) => {
    const own = answers.find(([who]) => who === side) ?? answers.at(-1);
    return [{ role: "user", content: asked }, { role: "assistant", content: own[1] }];
  });

  // Shows the answer of one side. A model without a chat template continues the text.
  async function answer(turn, i, earlier, how, signal) {
    const own = turn.answers[i];
    const [text, note] = turn.places[i];
    const before = system.value.trim() ? [{ role: "system", content: system.value.trim() }] : [];
    const messages = [...before, ...earlier, { role: "user", content: turn.asked }];
    const { chats } = state.served;
    const plain = messages.map(({ content }) => content).join("\n");
    const path = chats ? "/v1/chat/completions" : "/v1/completions";
    const body = { ...(chats ? { messages } : { prompt: plain }), ...how,
      stream_options: { include_usage: true } };
    const began = performance.now();
    let [whole, pieces] = ["", 0];
    const say = (words) => (note.textContent = own[2] = words);
    try {
      for await (const { choices, usage } of chunks(path, body, signal)) {
        const more = choices[0]?.delta?.content ?? choices[0]?.text ?? "";
        if (more) [whole, pieces] = [whole + more, pieces + 1];
        text.textContent = whole || "…";
        if (!usage) continue;
        const { completion_tokens: made } = usage;
        const speed = (1000 * made) / (performance.now() - began);
        say(`${counted(made, "token")}, ${fixed(speed, 1)} tokens/s`);
      }
    } catch (error) {
      // The number of tokens is not known, because a piece may contain several.
      if (signal.aborted) say(`stopped after ${counted(pieces, "piece")}`);
      throw error;
    } finally {
      text.textContent = own[1] = whole;
    }
  }

  // Restores the stored chat, unless the address names another model.
  const named = given.get("model");
  const same = !named || named === old.model;
  for (const { name, own } of sampling) own.value = old.set?.[name] ?? "";
  system.value = old.system ?? "";
  model.set(named ?? old.model ?? state.served?.path);
  if (model.value === null) model.set(state.served?.path ?? (models.length === 1 ? models[0].path : null));
  const adapter = given.get("adapter");
  await changed(same ? { left: old.left, right: adapter ?? old.right } : { right: adapter });
  if (same && old.model === model.value && Array.isArray(old.turns)) {
    turns = old.turns.map(({ asked, answers }) => ({ asked, answers }));
    showTurns();
    keep();
  }
  showState();
  every(2, look);
}
