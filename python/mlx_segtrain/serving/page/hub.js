// What comes to this machine: from the hub by its name, and from the browser's as a file.

import { api, follow, upload } from "./api.js";
import { announce, button, empty, h, meter, notice, show } from "./dom.js";
import { many, percent, sentence, size } from "./text.js";

// A name of the hub, with or without a revision; of a data set with a configuration and a split.
export const NAME = /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$/;
export const DATA_NAME =
  /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(\/[\w.+-]+)?(:[\w.-]+)?$/;
// Endings of files with rows, as the server reads them.
export const ROWS = ".jsonl,.ndjson,.json,.csv,.tsv,.parquet,.arrow,.feather,.gz,.zst";

// Models or data sets of the hub with these words in their names, as a combobox offers them.
export async function seek(kind, words) {
  if (/^[~/]/.test(words)) return []; // a path
  const { found } = await api(`/api/hub/search?${new URLSearchParams({ kind, words })}`);
  return found.map(({ name, downloads }) => [name, `${name} · on the Hugging Face hub, ${many(downloads)} downloads`]);
}

// Puts the hub's thing on this machine by a job, and shows in a place how far that is; returns the
// job that has ended, or throws.
export async function download(place, name, kind) {
  let failure = null;
  const tell = (event) => {
    if (event.type === "failed" || event.type === "cancelled") failure = event;
    if (event.share === undefined) return;
    show(place, bar(event.share), h("p.small.muted", event.message));
  };
  show(place, empty(`Asking the hub for ${name} …`));
  announce(`Downloading ${name}.`);
  const { job_id } = await api("/api/hub/download", { name, kind });
  await new Promise((end) => follow(job_id, 0, tell, end));
  if (failure) throw new Error(failure.error ?? failure.message);
  const { job } = await api(`/api/jobs/${job_id}`);
  show(place, h("p.small.muted", `${name} is on this machine.`));
  announce(`${name} is downloaded.`);
  return job;
}

// A button that brings what is named on the hub; `ended` gets its job.
export function offer(name, kind, ended) {
  const place = h("div.stack");
  function ask(...said) {
    const more = h("span.muted.small", "Needed only if it is not on this machine yet.");
    show(place, said, h("div.actions", button("Download", bring), more));
  }
  async function bring() {
    try {
      const job = await download(place, name, kind);
      if (place.isConnected) await ended(job);
    } catch (error) {
      ask(notice(sentence(error.message), "bad", { role: "alert" }));
    }
  }
  ask();
  return place;
}

const bar = (share) => meter(share, { role: "img", "aria-label": percent(share) });

// Sends files into one folder of the server's store, whose path is returned: [file, its name there]
// each. Another name is found if a folder of this one has such files.
export async function sendAll(place, kind, wanted, files) {
  const clean = wanted.replace(/[^\w.-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 56) || kind;
  for (let n = 1; ; n++) {
    const name = n > 1 ? `${clean}-${n}` : clean;
    try {
      return await send(place, kind, name, files);
    } catch (error) {
      if (error.status !== 409 || n > 50) throw error;
    }
  }
}

// What was sent before a file that is refused is of no use: it is deleted.
export async function send(place, kind, name, files) {
  let path = null;
  const sent = [];
  try {
    for (const [file, as] of files) {
      const tell = (share) => show(place, bar(share),
        h("p.small.muted", `Sending ${file.name}: ${percent(share)} of ${size(file.size)}`));
      tell(0);
      announce(`Sending ${file.name}.`);
      const address = `/api/${kind}/${name}/${as}`;
      ({ path } = await upload(address, file, tell));
      sent.push(address);
    }
  } catch (error) {
    for (const own of sent) await api(own, undefined, { method: "DELETE" }).catch(() => {});
    throw error;
  }
  show(place);
  announce("All files have been sent.");
  return path;
}

// Sends files of rows as one data set, and tells which of them is for what; returns its path.
export async function sendRows(place, files) {
  const own = splits(files);
  const path = await sendAll(place, "datasets", stem(own[0][0]), own);
  const [train, valid] = own.map(([file]) => file.name);
  const said = valid ? `${train} is for training, ${valid} for validation.` : `${train} is for training.`;
  show(place, h("p.small.muted", said));
  announce(said);
  return path;
}

const FOR = {
  train: /(^|[^a-z])train(ing)?([^a-z]|$)/i,
  valid: /(^|[^a-z])(val|valid|validation|dev|eval|evaluation|test)([^a-z]|$)/i,
};

// Which of the files that were chosen is for training, and which for validation, by their names:
// the order in which a browser lists them says nothing. [file, its name on the server] each.
export function splits(files) {
  if (files.length > 2) throw new Error("Choose one file, or one for training and one for validation.");
  const late = ({ name }) => FOR.valid.test(name) - FOR.train.test(name);
  const [train, valid] = files.toSorted((a, b) => late(a) - late(b));
  if (!valid) return [[train, namedAs("train", train)]];
  if (late(train) === late(valid)) {
    throw new Error(`${train.name} and ${valid.name} do not say which of them is for validation: ` +
      "call them train and valid.");
  }
  return [[train, namedAs("train", train)], [valid, namedAs("valid", valid)]];
}

// What a file of rows is called on the server: its split, with its own endings.
export function namedAs(split, file) {
  const endings = file.name.toLowerCase().match(/\.[a-z]+(\.(gz|zst))?$/)?.[0] ?? "";
  return split + endings;
}

export const stem = (file) => file.name.replace(/\.[A-Za-z]+(\.(gz|zst))?$/, "");
