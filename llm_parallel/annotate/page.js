// What the annotation page says to its server, and what this browser keeps: the annotator's name, colours, and a
// judgement until the server has confirmed it.

const $ = (id) => document.getElementById(id);
const PREFIX = "llm-parallel.annotate.";

let about = null; // {title, mode, asked} of the server
let task = null; // {id, prompt, answers} that is shown
let busy = false; // a request is under way, during which no key counts
let since = 0; // when the task was shown

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function kept(storage, name) {
  try {
    return storage().getItem(PREFIX + name);
  } catch {
    return null;
  }
}

function keep(storage, name, value) {
  try {
    if (value === null) storage().removeItem(PREFIX + name);
    else storage().setItem(PREFIX + name, value);
    return true;
  } catch {
    return false;
  }
}

const local = () => localStorage;
const session = () => sessionStorage;

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// The token of a server that other machines reach stands after the #, which a browser sends to nobody.
function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!found) return;
  keep(session, "token", found);
  history.replaceState(null, "", location.pathname);
}

async function request(action, body = {}) {
  const token = kept(session, "token");
  const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const sent = JSON.stringify({ annotator: annotator(), ...body });
  const response = await fetch(`api/${action}`, { method: "POST", headers, body: sent });
  let found = null;
  try {
    found = await response.json();
  } catch {
    // The status says enough.
  }
  if (response.ok && found) return found;
  const error = new Error(found?.error?.message ?? `The server answered with status ${response.status}.`);
  error.status = response.status;
  if (response.status === 401) error.message = "Open the whole address that the command has printed, with its token.";
  throw error;
}

const annotator = () => kept(local, "name") ?? $("annotator").value.trim();

// Does one action and shows what comes of it. Nothing is taken from the keyboard meanwhile.
async function act(action, body) {
  if (busy) return null;
  setBusy(true);
  try {
    const found = await request(action, body);
    notify("");
    return found;
  } catch (error) {
    notify(error instanceof TypeError ? "The server cannot be reached; press again when it runs." : error.message);
    return null;
  } finally {
    setBusy(false);
  }
}

function setBusy(value) {
  busy = value;
  $("main").setAttribute("aria-busy", String(value));
}

// A judgement is kept here until the server has it on its disk, so that closing or reloading the page loses nothing.
async function send(action, body) {
  if (busy) return;
  const waiting = { action, body, name: annotator() };
  keep(local, "waiting", JSON.stringify(waiting));
  const found = await act(action, body);
  if (!found) return;
  keep(local, "waiting", null);
  show(found);
}

async function sendWaiting() {
  let waiting = null;
  try {
    waiting = JSON.parse(kept(local, "waiting") ?? "null");
  } catch {
    // It is no judgement of this page.
  }
  if (!waiting) return;
  try {
    await request(waiting.action, { ...waiting.body, annotator: waiting.name });
  } catch (error) {
    if (error instanceof TypeError || error.status >= 500) return; // it is sent when the page is loaded again
    notify(`A judgement that was not sent before is refused: ${error.message}`);
  }
  keep(local, "waiting", null);
}

async function begin() {
  const name = kept(local, "name");
  if (!name) {
    $("annotator").value = "";
    if (!$("name").open) $("name").showModal();
    return;
  }
  $("who").textContent = name;
  await sendWaiting();
  const found = await act("start");
  if (!found) return;
  about = found;
  $("title").textContent = found.title;
  document.title = `${found.title} · Annotate`;
  show(found);
}

function show({ task: next, progress }) {
  task = next;
  since = performance.now();
  showProgress(progress);
  showTask();
  if (!task) showEnd(progress);
  $("status").textContent = task ? "The next item is shown." : "There is nothing left to judge.";
  scrollTo(0, 0);
}

function showProgress({ judged, skipped, left, all, wanted }) {
  const total = judged + skipped + left;
  $("bar").max = Math.max(total, 1);
  $("bar").value = judged + skipped;
  const parts = [`${judged} of ${total - skipped}`];
  if (skipped) parts.push(`${skipped} skipped`);
  parts.push(`all: ${all} of ${wanted}`);
  $("count").textContent = parts.join(" · ");
}

function showEnd({ judged, skipped, elsewhere }) {
  const text = [judged ? `Done: you have judged ${judged}. Thank you.` : "There is nothing for you to judge."];
  if (elsewhere) text.push(`${elsewhere} ${elsewhere === 1 ? "is" : "are"} with other annotators now.`);
  const look = async (again) => {
    const found = await act("next", { again });
    if (found) show(found);
  };
  const buttons = [];
  if (skipped) buttons.push(node("button", { type: "button", id: "again", click: () => look(true) },
    `Judge the ${skipped} skipped`));
  buttons.push(node("button", { type: "button", id: "look", click: () => look(false) }, "Look again"));
  $("end").replaceChildren(...text.map((line) => node("p", {}, line)), node("div", { class: "bar" }, ...buttons));
}

function setName() {
  const name = $("annotator").value.split(/\s+/).filter(Boolean).join(" ");
  if (!name) return;
  keep(local, "name", name);
  begin();
}

const percent = (value) => (value === null ? "not defined" : `${(100 * value).toFixed(1)} %`);
const coefficient = (value) => (value === null ? "not defined" : value.toFixed(2));

async function showAgreement() {
  const found = await act("agreement");
  if (!found) return;
  const row = (...cells) => node("tr", {}, ...cells.map((cell) => node("td", {}, String(cell))));
  const rows = [row("judged by two or more", found.units)];
  if (found.units) {
    rows.push(row("the same", percent(found.raw)), row("Krippendorff's alpha", coefficient(found.alpha)));
    for (const [one, other, kappa, count] of found.kappas) {
      rows.push(row(`Cohen's kappa of ${one} and ${other}, over ${count}`, coefficient(kappa)));
    }
  }
  const people = Object.entries(found.people).map(([name, count]) => row(name, count));
  $("found").replaceChildren(
    node("table", {}, ...rows), node("h2", {}, "Judged"), node("table", {}, ...people),
    node("p", { class: "hint" }, found.units ? "Over 0.8 is usually taken for good agreement, under 0.67 for poor."
      : "Nothing was judged by two annotators yet; --overlap 2 lets each item be judged twice."),
  );
  if (!$("agreement").open) $("agreement").showModal();
}
