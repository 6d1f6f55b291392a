// Requests to the server's API, and their errors.

// An error with the server's message; `field` names the field that has to be changed, if any.
class Problem extends Error {
  constructor(message, field = null, status = 0) {
    super(message);
    Object.assign(this, { field, status });
  }
}

// The number of milliseconds by which the server's clock is ahead of the browser's.
let ahead = 0;
export const now = () => Date.now() + ahead;

async function request(path, body, more = {}) {
  const json = { "content-type": "application/json" };
  const how = body && { method: "POST", headers: json, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { ...how, ...more });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("the server does not answer: is it running?");
  }
  ahead = Date.parse(answer.headers.get("date")) - Date.now() || 0;
  if (answer.ok) return answer;
  if (answer.status === 401) location.assign("/login"); // the session has ended
  const { error, field } = await answer.json().catch(() => ({}));
  const said = error?.message ?? error ?? `the server answered with status ${answer.status}.`;
  throw new Problem(said, field, answer.status);
}

// Returns the JSON of a route; a body is posted.
export const api = async (path, body, more) => (await request(path, body, more)).json();

// Uploads a file; `tell` receives the fraction sent, which only XMLHttpRequest reports (fetch does not).
export function upload(path, file, tell) {
  return new Promise((done, failed) => {
    const sent = new XMLHttpRequest();
    sent.open("PUT", path);
    sent.responseType = "json";
    sent.upload.onprogress = ({ loaded, total }) => tell(loaded / total);
    sent.onload = () => {
      if (sent.status < 300) return done(sent.response);
      failed(new Problem(sent.response?.error ?? `the server answered with status ${sent.status}.`, null, sent.status));
    };
    sent.onerror = () => failed(new Problem("the connection was interrupted: is the server running?"));
    sent.send(file);
  });
}

// Calls `ask` every few seconds while the page is visible (`unseen`: always), and never twice at the same time.
// Returns a function that calls it immediately.
export function every(seconds, ask, { unseen = false } = {}) {
  let asking = false;
  async function look() {
    if (asking || (document.hidden && !unseen)) return;
    asking = true;
    try {
      await ask();
    } catch (error) {
      if (!(error instanceof Problem)) throw error; // otherwise the next call may succeed
    } finally {
      asking = false;
    }
  }
  setInterval(look, 1000 * seconds);
  document.addEventListener("visibilitychange", look);
  return look;
}

// Passes the events of a job to `take`, from an offset in its log until the job has ended; returns a function that
// stops this. A browser allows only a few connections to a server, so a hidden page closes its connection.
export function follow(id, place, take, ended) {
  let source;
  const seen = () => (document.hidden ? source?.close() : open());
  function stop() {
    source?.close();
    source = null;
    document.removeEventListener("visibilitychange", seen);
  }
  function open() {
    source?.close();
    source = new EventSource(`/api/jobs/${encodeURIComponent(id)}/stream?after=${place}`);
    source.onmessage = ({ data, lastEventId }) => {
      place = +lastEventId || place;
      take(JSON.parse(data), place);
    };
    source.addEventListener("end", () => (stop(), ended()));
    source.onerror = ({ target }) => {
      // The browser reconnects after an interruption, but not after an error status.
      const refused = () => target === source && target.readyState === EventSource.CLOSED;
      if (refused()) setTimeout(() => refused() && !document.hidden && open(), 2000);
    };
  }
  document.addEventListener("visibilitychange", seen);
  seen();
  return stop;
}

// Yields the chunks of a streamed response of /v1.
export async function* chunks(path, body, signal) {
  const answer = await request(path, { ...body, stream: true }, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Problem(chunk.error.message);
      yield chunk;
    }
  }
}
