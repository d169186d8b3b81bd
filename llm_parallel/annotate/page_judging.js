// How an item is shown, and what keys and buttons do with it.

let ranks = []; // in the order of the answers: 0 for one that has no rank yet
const ASKED = {
  best: "Which answer is the best?",
  ranking: "Put the answers in order, the best first.",
  pair: "Which answer is better?",
  "good-bad": "Is the answer good?",
};
const KEYS = {
  best: "1 to 9 chooses, arrows and Enter too, 0 a tie, s skips, u takes back",
  ranking: "1 to 9 gives the next rank, = the same rank as the last, Backspace takes it back, Enter ends, 0 all equal, "
    + "s skips, u takes back",
  pair: "← or 1, → or 2 chooses, ↓ or 0 a tie, s skips, u takes back",
  "good-bad": "→, 1 or g: good, ←, 2 or b: bad, s skips, u takes back",
};

function showTask() {
  const mode = about.mode;
  ranks = task ? task.answers.map(() => 0) : [];
  for (const id of ["prompt", "question", "answers"]) $(id).hidden = !task;
  for (const id of ["tie", "skip"]) $(id).hidden = !task || (id === "tie" && mode === "good-bad");
  $("end").hidden = Boolean(task);
  $("good")?.remove();
  $("bad")?.remove();
  $("keys").textContent = KEYS[mode];
  if (task) {
    $("question").textContent = ASKED[mode];
    $("prompt").replaceChildren(...task.prompt.map(turnView));
    $("answers").classList.toggle("alone", mode === "good-bad");
    $("answers").replaceChildren(...task.answers.map(answerView));
    if (mode === "good-bad") $("skip").before(
      node("button", { type: "button", id: "bad", class: "bad", click: () => judge([2]) }, "Bad"),
      node("button", { type: "button", id: "good", class: "good", click: () => judge([1]) }, "Good"));
    // The page is ready for keys; a screen reader begins with the prompt.
    document.activeElement?.blur?.();
  }
  showRanks();
}

function turnView({ role, text }) {
  return node("div", { class: `turn ${role}` }, node("span", { class: "role" }, role),
    node("div", { class: "text", dir: "auto" }, text));
}

function answerView(text, place) {
  const number = node("span", { class: "number", "aria-hidden": "true" }, String(place + 1));
  const label = about.mode === "good-bad" ? "Answer" : `Answer ${place + 1}`;
  const parts = [number, node("span", { class: "role" }, label), node("span", { class: "rank" })];
  parts.push(node("div", { class: "text", dir: "auto" }, text));
  if (about.mode === "good-bad") return node("div", { class: "answer" }, ...parts);
  // Not a click that ends a selection of text.
  const chosen = () => String(getSelection()) || choose(place);
  return node("div", { class: "answer", role: "button", tabindex: "0", "aria-label": `${label}: ${text}`,
    click: chosen }, ...parts);
}

const cards = () => [...$("answers").children];

function showRanks() {
  const isRanking = about.mode === "ranking" && task;
  cards().forEach((card, place) => {
    card.classList.toggle("chosen", ranks[place] > 0);
    card.querySelector(".rank").textContent = isRanking && ranks[place] ? `rank ${ranks[place]}` : "";
  });
  $("submit").hidden = $("back").hidden = !isRanking;
  $("submit").disabled = !ranks.every(Boolean);
  $("back").disabled = !ranks.some(Boolean);
}

let given = []; // places in the order in which they got a rank

function choose(place, same = false) {
  if (!task || busy || place >= task.answers.length) return;
  if (about.mode !== "ranking") {
    judge(ranks.map((_, other) => (other === place ? 1 : 2)));
    return;
  }
  given = given.filter((one) => ranks[one]);
  if (ranks[place]) return;
  const last = Math.max(0, ...ranks);
  ranks[place] = same && last ? last : last + 1;
  given.push(place);
  const left = ranks.flatMap((rank, other) => (rank ? [] : [other]));
  $("status").textContent = `Answer ${place + 1} has rank ${ranks[place]}; ${left.length} left.`;
  showRanks();
}

let equal = false; // the next answer gets the rank of the last one

function takeBack() {
  given = given.filter((one) => ranks[one]);
  const place = given.pop();
  if (place !== undefined) ranks[place] = 0;
  equal = false;
  showRanks();
}

function judge(all) {
  if (!task || busy) return;
  all.forEach((rank, place) => { ranks[place] = about.mode === "good-bad" ? 0 : (rank === 1 ? 1 : 0); });
  if (about.mode === "ranking") all.forEach((rank, place) => { ranks[place] = rank; });
  showRanks();
  send("judge", { task: task.id, ranks: all, seconds: (performance.now() - since) / 1000 });
}

const tie = () => task && about.mode !== "good-bad" && judge(ranks.map(() => 1));
const skip = () => task && send("skip", { task: task.id });
const submit = () => task && about.mode === "ranking" && ranks.every(Boolean) && judge([...ranks]);

async function undo() {
  const found = await act("undo");
  if (!found) return;
  if (!found.undone) notify("There is nothing to take back.");
  show(found);
}

function moveFocus(by) {
  const all = cards();
  const at = all.indexOf(document.activeElement);
  all[at < 0 ? (by > 0 ? 0 : all.length - 1) : (at + by + all.length) % all.length]?.focus();
}

function press(key) {
  const mode = about.mode;
  const focused = cards().indexOf(document.activeElement);
  if (key === "s") skip();
  else if (key === "u") undo();
  else if (!task) return false;
  else if (mode === "good-bad") {
    if (["ArrowRight", "1", "g"].includes(key)) judge([1]);
    else if (["ArrowLeft", "2", "b"].includes(key)) judge([2]);
    else return false;
  } else if (/^[1-9]$/.test(key)) {
    choose(Number(key) - 1, equal);
    equal = false;
  } else if (key === "0" || (mode === "pair" && key === "ArrowDown")) tie();
  else if (mode === "pair" && key === "ArrowLeft") choose(0);
  else if (mode === "pair" && key === "ArrowRight") choose(1);
  else if (key === "ArrowRight" || key === "ArrowDown") moveFocus(1);
  else if (key === "ArrowLeft" || key === "ArrowUp") moveFocus(-1);
  else if (mode === "ranking" && key === "=") equal = true;
  else if (mode === "ranking" && key === "Backspace") takeBack();
  else if ((key === "Enter" || key === " ") && focused >= 0 && !(ranks.every(Boolean) && mode === "ranking")) {
    choose(focused, equal);
    equal = false;
  } else if (key === "Enter") submit();
  else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  if ($("name").open || $("agreement").open || event.target.closest?.("input, textarea")) return;
  if (!about || (event.target.closest?.("button") && ["Enter", " "].includes(event.key))) return;
  if (press(event.key)) event.preventDefault();
});
$("undo").addEventListener("click", undo);
$("skip").addEventListener("click", skip);
$("tie").addEventListener("click", tie);
$("back").addEventListener("click", takeBack);
$("submit").addEventListener("click", submit);
$("agree").addEventListener("click", showAgreement);
$("who").addEventListener("click", () => {
  $("annotator").value = kept(local, "name") ?? "";
  $("name").showModal();
});
$("name").addEventListener("close", setName);
$("name").addEventListener("cancel", (event) => !kept(local, "name") && event.preventDefault());

// An item that is looked at for long stays with its annotator.
setInterval(() => {
  if (task && !busy && document.visibilityState === "visible") request("hold", { task: task.id }).catch(() => {});
}, 60_000);

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

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const name = names[(names.indexOf($("theme").value) + 1) % names.length];
  setTheme(name);
  keep(local, "theme", name === "auto" ? null : name);
});

setTheme(kept(local, "theme") in THEMES ? kept(local, "theme") : "auto");
takeToken();
begin();
