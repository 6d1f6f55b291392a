// Downloads from the hub to the server, and uploads of files from the browser.

import { api, follow, upload } from "./api.js";
import { announce, button, empty, h, meter, notice, show } from "./dom.js";
import { many, percent, sentence, size } from "./text.js";

// A name on the hub, with an optional revision; for a data set also a configuration and a split.
export const NAME = /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$/;
export const DATA_NAME =
  /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(\/[\w.+-]+)?(:[\w.-]+)?$/;
// Extensions of the data files that the server can read.
export const ROWS = ".jsonl,.ndjson,.json,.csv,.tsv,.parquet,.arrow,.feather,.gz,.zst";

// Searches models or data sets on the hub; returns options for a combobox.
export async function seek(kind, words) {
  if (/^[~/]/.test(words)) return []; // a path
  const { found } = await api(`/api/hub/search?${new URLSearchParams({ kind, words })}`);
  return found.map(({ name, downloads }) => [name, `${name} · on the Hugging Face hub, ${many(downloads)} downloads`]);
}

// Downloads a model or a data set to the server, with progress in `place`. Returns the finished job, or throws.
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

// A button that downloads a name on the hub; `ended` receives the finished job.
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

// Uploads files, pairs of [file, name on the server], into a folder of the server's store, and returns the folder's
// path. If the folder already contains such files, tries other names.
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

// Uploads files into the folder `name`. If one is refused, deletes those already uploaded.
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

// Uploads files of rows as one data set, and shows which of them is for validation; returns its path.
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

// Determines from their names which file is for training, and which for validation, since browsers list files in
// any order. Returns pairs of [file, name on the server].
export function splits(files) {
  if (files.length > 2) throw new Error("Choose one file, or one for training and one for validation.");
  const late = ({ name }) => FOR.valid.test(name) - FOR.train.test(name);
  const [train, valid] = files.toSorted((a, b) => late(a) - late(b));
  if (!valid) return [[train, namedAs("train", train)]];
  if (late(train) === late(valid)) {
    throw new Error(`The names ${train.name} and ${valid.name} do not say which file is for validation: ` +
      "rename the files to train and valid.");
  }
  return [[train, namedAs("train", train)], [valid, namedAs("valid", valid)]];
}

// Returns the name of a file of rows on the server: its split, and its own extensions.
export function namedAs(split, file) {
  const endings = file.name.toLowerCase().match(/\.[a-z]+(\.(gz|zst))?$/)?.[0] ?? "";
  return split + endings;
}

export const stem = (file) => file.name.replace(/\.[A-Za-z]+(\.(gz|zst))?$/, "");
