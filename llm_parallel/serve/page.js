// The chat page: conversations, which are kept in this browser, and answers, which come from the server of this page.

const $ = (id) => document.getElementById(id);
const PREFIX = "llm-parallel.chat.";
const FIELDS = ["temperature", "top_p", "max_tokens", "seed"];
const MANY = 200; // conversations in the list

let current = null; // the conversation that is shown
let running = null; // {conversation, stop: AbortController} of the answer that is being written
let follows = true; // whether the log stays at its end while text comes

// What the browser keeps. A private window or a full disk may refuse; the page works on and says so.

function keep(storage, name, value) {
  try {
    if (value === null) storage().removeItem(PREFIX + name);
    else storage().setItem(PREFIX + name, value);
  } catch {
    notify("This browser does not keep the conversation: its storage is full or switched off.");
  }
}

function kept(storage, name) {
  try {
    return storage().getItem(PREFIX + name);
  } catch {
    return null;
  }
}

const local = () => localStorage;
const session = () => sessionStorage;

function conversations() {
  const found = [];
  try {
    for (const name of Object.keys(localStorage)) {
      if (name.startsWith(PREFIX + "c.")) found.push(readConversation(localStorage.getItem(name)));
    }
  } catch {
    // Without storage there is the shown conversation alone.
  }
  return found.filter(Boolean).sort((one, other) => other.at - one.at);
}

function readConversation(text) {
  try {
    const read = JSON.parse(text);
    return typeof read.id === "string" && Array.isArray(read.messages) ? read : null;
  } catch {
    return null;
  }
}

function saveConversation(conversation) {
  conversation.at = Date.now();
  keep(local, "c." + conversation.id, JSON.stringify(conversation));
  showList();
}

function newConversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  const { model, parameters } = current ?? readSettings();
  return { id, at: Date.now(), system: "", messages: [], model, parameters: { ...parameters } };
}

function readSettings() {
  try {
    const { model, parameters } = JSON.parse(kept(local, "last") ?? "{}");
    return { model: model ?? "", parameters: parameters ?? {} };
  } catch {
    return { model: "", parameters: {} };
  }
}

const titleOf = (conversation) =>
  conversation.messages.find((message) => message.role === "user")?.content.slice(0, 80) || "New conversation";

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// The list of conversations.

function showList() {
  const all = conversations();
  $("conversations").replaceChildren(...all.slice(0, MANY).map((one) => {
    const open = node("button", { type: "button", class: "title", dir: "auto", title: titleOf(one),
      click: () => openConversation(one.id) }, titleOf(one));
    const remove = node("button", { type: "button", class: "delete icon", "aria-label": `Delete ${titleOf(one)}`,
      click: () => deleteConversation(one) }, "✕");
    const isCurrent = one.id === current?.id;
    if (isCurrent) open.setAttribute("aria-current", "true");
    return node("li", { class: isCurrent ? "current" : null }, open, remove);
  }));
}

function openConversation(id) {
  stopAnswer();
  current = conversations().find((one) => one.id === id) ?? newConversation();
  fillSettings();
  showMessages();
  showList();
  toggleSidebar(false);
}

function beginConversation() {
  stopAnswer();
  current = newConversation();
  fillSettings();
  showMessages();
  showList();
  toggleSidebar(false);
  $("message").focus();
}

function deleteConversation(one) {
  if (!confirm(`Delete “${titleOf(one)}”?`)) return;
  keep(local, "c." + one.id, null);
  if (one.id === current.id) beginConversation();
  showList();
}

function toggleSidebar(open) {
  $("sidebar").classList.toggle("open", open);
  $("shade").hidden = !open;
  $("show").setAttribute("aria-expanded", String(open));
  if (open) $("new").focus();
}

// Messages.

function showMessages() {
  const shown = current.messages.map((message, place) => messageView(message, place).view);
  if (current.system) shown.unshift(node("article", { class: "system", "aria-label": "System prompt" },
    node("div", { class: "text", dir: "auto" }, current.system)));
  if (!current.messages.length) shown.push(node("p", { class: "empty" }, "Write a message to begin."));
  $("messages").replaceChildren(...shown);
  document.title = `${titleOf(current)} · Chat`;
  follows = true;
  scrollDown();
}

function messageView(message, place) {
  const text = node("div", { class: "text", dir: "auto" });
  const tools = node("div", { class: "tools" });
  const mine = message.role === "user";
  const view = node("article", { class: mine ? "user" : "assistant", "aria-label": mine ? "You" : "Answer" });
  const thought = node("details", { class: "thought", hidden: "" }, node("summary", {}, "Reasoning"), node("pre"));
  view.append(...(mine ? [text] : [thought, text]), tools);
  const markdown = mine ? null : new MarkdownView(text);
  const show = () => {
    if (mine) text.textContent = message.content;
    else markdown.show(message.content);
    thought.hidden = !message.reasoning;
    thought.lastChild.textContent = message.reasoning ?? "";
  };
  show();
  if (message.note) tools.before(node("p", { class: message.failed ? "note wrong" : "note" }, message.note));
  const button = (name, does, title) => {
    const made = node("button", { type: "button", title }, name);
    made.addEventListener("click", () => does(made));
    tools.append(made);
  };
  if (message.content) button("Copy", (made) => copyText(message.content, made), "Copy the text as it was written");
  if (mine) button("Edit", () => editMessage(view, place), "Change this message and send it again");
  else if (place === current.messages.length - 1) button("Regenerate", regenerate, "Replace this answer");
  if (message.about) tools.append(node("span", { class: "about" }, message.about));
  return { view, text, show };
}

function editMessage(view, place) {
  if (running) return;
  const message = current.messages[place];
  const field = node("textarea", { class: "edit", rows: Math.min(12, message.content.split("\n").length + 1),
    "aria-label": "Edit the message", dir: "auto" });
  field.value = message.content;
  const send = () => {
    if (!field.value.trim()) return;
    current.messages.splice(place);
    ask(field.value.trim());
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") showMessages();
    else if (isSend(event)) {
      event.preventDefault();
      send();
    }
  });
  const later = current.messages.length - place - 1;
  const what = later === 1 ? "message" : `${later} messages`;
  const tools = node("div", { class: "tools" },
    node("span", { class: "about" }, later ? `Replaces the ${what} below.` : ""),
    node("button", { type: "button", click: showMessages }, "Cancel"),
    node("button", { type: "button", class: "strong", click: send }, "Send"));
  view.classList.add("editing");
  view.replaceChildren(field, tools);
  field.focus();
}

function scrollDown() {
  if (follows) $("log").scrollTop = $("log").scrollHeight;
  $("down").hidden = follows || $("log").scrollHeight <= $("log").clientHeight;
}

// Answers.

function ask(text) {
  current.messages.push({ role: "user", content: text });
  answer(0);
}

function regenerate() {
  if (running || current.messages.at(-1)?.role !== "assistant") return;
  answer((current.messages.pop().tries ?? 0) + 1);
}

// What the server is asked: the system prompt, and all messages but the first `left`.
function bodyOf(conversation, tries, left) {
  const written = conversation.messages.slice(left).filter(({ content }) => content);
  const messages = written.map(({ role, content }) => ({ role, content }));
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  const parameters = Object.fromEntries(Object.entries(conversation.parameters).filter(([, value]) => value !== null));
  if (parameters.seed !== undefined) parameters.seed += tries;
  return { model: conversation.model, messages, ...parameters, stream: true, stream_options: { include_usage: true } };
}

async function answer(tries) {
  const conversation = current;
  const stop = new AbortController();
  const message = { role: "assistant", content: "", tries };
  running = { conversation, stop };
  saveConversation(conversation);
  showMessages();
  const { view, show } = messageView(message, -1);
  $("messages").append(view);
  setBusy(true, view);
  let due = 0;
  const later = () => {
    due ||= requestAnimationFrame(() => {
      due = 0;
      show();
      scrollDown();
    });
  };
  try {
    await stream(conversation, message, stop.signal, later);
  } catch (error) {
    if (stop.signal.aborted) message.note = "Stopped.";
    else {
      message.failed = true;
      message.note = error instanceof TypeError ? "The server cannot be reached." : error.message;
    }
  }
  cancelAnimationFrame(due);
  conversation.messages.push(message);
  saveConversation(conversation);
  running = null;
  setBusy(false, view);
  if (conversation !== current) return;
  const last = messageView(message, conversation.messages.length - 1);
  view.replaceWith(last.view);
  scrollDown();
  $("status").textContent = message.note ?? "The answer is complete.";
}

async function stream(conversation, message, signal, changed) {
  const began = performance.now();
  let usage = null;
  let reason = null;
  let left = 0;
  let first = null;
  const response = await begin(conversation, message.tries, signal, (count) => { left = count; });
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message ?? "The server broke the answer off.");
    usage = chunk.usage ?? usage;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    reason = choice.finish_reason ?? reason;
    const reasoning = choice.delta?.reasoning_content ?? choice.delta?.reasoning;
    if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
    message.content += choice.delta?.content ?? "";
    for (const call of choice.delta?.tool_calls ?? []) message.content += callOf(call);
    if (first === null && (message.content || reasoning)) first = performance.now();
    changed();
  }
  if (usage) message.about = aboutOf(usage, first ?? began);
  const notes = [];
  if (left) notes.push(`The first ${left === 1 ? "message does" : `${left} messages do`} not fit and were left out.`);
  if (reason === "length") notes.push("The answer ended at the limit of tokens.");
  if (reason === null) notes.push("The server closed the connection before the answer was complete.");
  if (reason !== null && !message.content && !message.reasoning) notes.push("The answer is empty.");
  if (notes.length) message.note = notes.join(" ");
}

const callOf = ({ function: called }) => (called?.name ? `\n\n${called.name} ` : "") + (called?.arguments ?? "");

function aboutOf({ completion_tokens: count }, since) {
  const seconds = (performance.now() - since) / 1000;
  const rate = count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${count} ${count === 1 ? "token" : "tokens"}${rate}`;
}

// The response to a request. Where the conversation is too long for the model, its oldest messages are left out.
async function begin(conversation, tries, signal, leftOut) {
  for (let left = 0; ; leftOut(left)) {
    const response = await request("v1/chat/completions", {
      method: "POST", body: JSON.stringify(bodyOf(conversation, tries, left)), signal,
      headers: { "Content-Type": "application/json" },
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    const next = conversation.messages.findIndex(({ role }, place) => place > left && role === "user");
    if (!error.isTooLong || next < 0) throw error;
    left = next;
  }
}

function request(path, options = {}) {
  const key = kept(session, "key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { ...options, headers });
}

async function errorOf(response) {
  let found = {};
  try {
    const body = await response.json();
    found = body.error ?? { message: body.detail ?? body.message };
  } catch {
    // The status says enough.
  }
  const said = typeof found === "string" ? found : found.message;
  const error = new Error(said ? String(said) : `The server answered with status ${response.status}.`);
  const isNamed = /context_length|context_size/.test(`${found.code} ${found.type}`);
  error.isTooLong = response.status === 400 && (isNamed || /context (length|size|window)/i.test(said ?? ""));
  const wait = response.headers.get("Retry-After");
  if (response.status === 429) error.message += wait ? ` Try again in ${wait} s.` : " Try again in a moment.";
  if (response.status === 401) {
    error.message = `The server wants another API key: ${error.message}`;
    openSettings("key");
  }
  return error;
}

async function* events(response) {
  let rest = "";
  for await (const text of texts(response)) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function* texts(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function stopAnswer() {
  running?.stop.abort();
}

function setBusy(busy, view) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  view.classList.toggle("busy", busy);
  view.setAttribute("aria-busy", String(busy));
  if (busy) $("status").textContent = "The answer is being written.";
}
