// What the buttons, fields and keys of the chat page do, and how the page begins.

async function loadModels() {
  let names = [];
  try {
    const response = await request("v1/models");
    if (!response.ok) throw await errorOf(response);
    names = (await response.json()).data.map((model) => String(model.id));
    notify("");
  } catch (error) {
    notify(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
  const options = names.map((name) => node("option", { value: name }, name));
  $("model").replaceChildren(...options);
  $("model").disabled = names.length < 2;
  showModel();
}

function showModel() {
  const names = [...$("model").options].map((option) => option.value);
  if (names.length && !names.includes(current.model)) current.model = names[0];
  $("model").value = current.model;
}

function fillSettings() {
  $("system").value = current.system;
  for (const name of FIELDS) $(name).value = current.parameters[name] ?? "";
  $("key").value = kept(session, "key") ?? "";
  showModel();
}

function takeSettings() {
  const system = $("system").value.trim();
  const isOther = system !== current.system;
  current.system = system;
  for (const name of FIELDS) {
    const value = $(name).valueAsNumber;
    current.parameters[name] = Number.isNaN(value) ? null : value;
  }
  const key = $("key").value.trim();
  if (key !== (kept(session, "key") ?? "")) {
    keep(session, "key", key || null);
    loadModels();
  }
  rememberSettings();
  if (isOther && !running) showMessages();
}

function rememberSettings() {
  keep(local, "last", JSON.stringify({ model: current.model, parameters: current.parameters }));
  if (current.messages.length) saveConversation(current);
}

function openSettings(field) {
  fillSettings();
  if (!$("settings").open) $("settings").showModal();
  if (field) $(field).focus();
}

// Files have OpenAI's messages, as `llm-parallel chat` reads and writes them.

function exportConversation() {
  const messages = current.messages.map(({ role, content }) => ({ role, content }));
  if (current.system) messages.unshift({ role: "system", content: current.system });
  const blob = new Blob([JSON.stringify({ messages }, null, 1) + "\n"], { type: "application/json" });
  const address = URL.createObjectURL(blob);
  node("a", { href: address, download: "conversation.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

async function importConversation(file) {
  try {
    const read = JSON.parse(await file.text());
    const messages = Array.isArray(read) ? read : read.messages;
    const roles = ["system", "user", "assistant"];
    const isGood = ({ role, content }) => roles.includes(role) && typeof content === "string";
    if (!Array.isArray(messages) || !messages.every(isGood)) throw new SyntaxError();
    current = newConversation();
    current.system = messages.filter(({ role }) => role === "system").map(({ content }) => content).join("\n\n");
    const spoken = messages.filter(({ role }) => role !== "system");
    current.messages = spoken.map(({ role, content }) => ({ role, content }));
    saveConversation(current);
    notify("");
    $("settings").close();
    openConversation(current.id);
  } catch {
    $("settings").close();
    notify(`${file.name} has no list of messages with the roles system, user and assistant and a text each.`);
  }
}

const THEMES = {
  auto: ["◐", "Colours: as the system"],
  light: ["☀", "Colours: light"],
  dark: ["☾", "Colours: dark"],
};

function setTheme(name) {
  const [sign, label] = THEMES[name];
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = sign;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
  $("theme").value = name;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const name = names[(names.indexOf($("theme").value) + 1) % names.length];
  setTheme(name);
  keep(local, "theme", name === "auto" ? null : name);
}

const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function fitField() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function sendMessage() {
  const text = $("message").value.trim();
  if (!text || running) return;
  $("message").value = "";
  fitField();
  ask(text);
}

function editLast() {
  const own = [...document.querySelectorAll("article.user")].at(-1);
  const place = current.messages.findLastIndex(({ role }) => role === "user");
  if (own && place >= 0) editMessage(own, place);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  sendMessage();
});
$("message").addEventListener("input", fitField);
$("message").addEventListener("keydown", (event) => {
  if (isSend(event)) {
    event.preventDefault();
    sendMessage();
  } else if (event.key === "ArrowUp" && !$("message").value && !running) {
    event.preventDefault();
    editLast();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) {
    if ($("sidebar").classList.contains("open")) toggleSidebar(false);
    else stopAnswer();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    beginConversation();
  }
});
$("log").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("log");
  follows = scrollHeight - scrollTop - clientHeight < 60;
  $("down").hidden = follows;
});
$("down").addEventListener("click", () => {
  follows = true;
  scrollDown();
});
$("stop").addEventListener("click", () => {
  stopAnswer();
  $("message").focus();
});
$("new").addEventListener("click", beginConversation);
$("show").addEventListener("click", () => toggleSidebar(true));
$("hide").addEventListener("click", () => toggleSidebar(false));
$("shade").addEventListener("click", () => toggleSidebar(false));
$("open").addEventListener("click", () => openSettings());
$("settings").addEventListener("close", takeSettings);
$("theme").addEventListener("click", nextTheme);
$("model").addEventListener("change", () => {
  current.model = $("model").value;
  rememberSettings();
});
$("export").addEventListener("click", exportConversation);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) importConversation($("file").files[0]);
  $("file").value = "";
});
addEventListener("storage", showList); // another tab of this page

setTheme(kept(local, "theme") in THEMES ? kept(local, "theme") : "auto");
beginConversation();
loadModels();
