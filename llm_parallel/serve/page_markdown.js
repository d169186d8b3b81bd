// Markdown as DOM nodes. Text only ever becomes a text node, so nothing that a model writes is read as HTML. What is
// not understood stays as it was written. Every search is bounded, so that no text makes the page hang.

const MAX_DEPTH = 12;
const MAX_LINK_LENGTH = 2000;

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Blocks of a text: what each is made of, and its lines, by which a finished block is known again.

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;

const isBlank = (line) => line === undefined || line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

function isRule(line) {
  const marks = line.replaceAll(/\s/g, "");
  return indentOf(line) < 4 && marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function cellsOf(line) {
  const cells = [""];
  for (let at = 0; at < line.length; at++) {
    if (line[at] === "\\" && line[at + 1] === "|") cells[cells.length - 1] += line[++at];
    else if (line[at] === "|") cells.push("");
    else cells[cells.length - 1] += line[at];
  }
  const trimmed = cells.map((cell) => cell.trim());
  if (trimmed.length > 1 && trimmed[0] === "") trimmed.shift();
  if (trimmed.length > 1 && trimmed.at(-1) === "") trimmed.pop();
  return trimmed;
}

function isTable(lines, at) {
  const below = lines[at + 1];
  if (!lines[at].includes("|") || below === undefined || !below.includes("-")) return false;
  const marks = cellsOf(below);
  return marks.length === cellsOf(lines[at]).length && marks.every((cell) => /^:?-+:?$/.test(cell));
}

const beginsBlock = (lines, at) =>
  FENCE.test(lines[at]) || HEADING.test(lines[at]) || QUOTE.test(lines[at]) || isRule(lines[at]) ||
  ITEM.test(lines[at]) || isTable(lines, at);

function blocksOf(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const [kind, end] = blockAt(lines, at);
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return blocks;
}

function blockAt(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (fence) return ["code", endOfCode(lines, at + 1, fence[1])];
  if (HEADING.test(lines[at])) return ["heading", at + 1];
  if (isRule(lines[at])) return ["rule", at + 1];
  let end = at + 1;
  if (QUOTE.test(lines[at])) {
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    return ["quote", end];
  }
  if (ITEM.test(lines[at])) return ["list", endOfList(lines, at)];
  if (isTable(lines, at)) {
    while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|")) end++;
    return ["table", end];
  }
  while (end < lines.length && !isBlank(lines[end]) && !beginsBlock(lines, end)) end++;
  return ["paragraph", end];
}

function endOfCode(lines, at, mark) {
  const closes = (line) => {
    const text = line.trim();
    return indentOf(line) < 4 && text.length >= mark.length && text === mark[0].repeat(text.length);
  };
  while (at < lines.length && !closes(lines[at])) at++;
  return Math.min(at + 1, lines.length);
}

const isNumber = (item) => /\d/.test(item[2]);

function endOfList(lines, at) {
  const first = ITEM.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length) {
    if (isBlank(lines[end])) {
      let next = end;
      while (next < lines.length && isBlank(lines[next])) next++;
      const item = next < lines.length && ITEM.exec(lines[next]);
      const goesOn = next < lines.length && indentOf(lines[next]) > first[1].length + 1;
      if (!goesOn && !(item && isNumber(item) === isNumber(first))) break;
      end = next;
      continue;
    }
    const item = ITEM.exec(lines[end]);
    if (item && item[1].length <= first[1].length + 1 && isNumber(item) !== isNumber(first)) break;
    const isOwn = item || indentOf(lines[end]) > first[1].length + 1;
    if (!isOwn && beginsBlock(lines, end)) break;
    end++;
  }
  return end;
}

// Tabs before a line's text become spaces, but not in code, whose copy must be what was written.
function withIndentInSpaces(lines) {
  let mark = null;
  return lines.map((line) => {
    const fence = /^\s*(`{3,}|~{3,})/.exec(line);
    if (mark !== null) {
      if (fence && fence[1].startsWith(mark)) mark = null;
      return line;
    }
    if (fence) mark = fence[1];
    const text = line.trimStart();
    return line.slice(0, line.length - text.length).replaceAll("\t", "    ") + text;
  });
}

// Blocks as nodes.

function renderBlocks(blocks, depth) {
  return blocks.map((block) => renderBlock(block, depth));
}

function renderBlock({ kind, lines }, depth) {
  if (depth > MAX_DEPTH) return renderParagraph(lines);
  if (kind === "code") return renderCode(lines);
  if (kind === "rule") return node("hr");
  if (kind === "quote") {
    const inner = lines.map((line) => line.replace(/^ {0,3}> ?/, ""));
    return node("blockquote", { dir: "auto" }, ...renderBlocks(blocksOf(inner), depth + 1));
  }
  if (kind === "list") return renderList(lines, depth);
  if (kind === "table") return renderTable(lines);
  if (kind === "heading") {
    const [, marks] = HEADING.exec(lines[0]);
    const made = node(`h${marks.length}`, { dir: "auto" });
    const text = lines[0].trim().slice(marks.length).trim();
    const closing = /(^|\s)#+$/.exec(text.slice(-7));
    renderInline(closing ? text.slice(0, text.length - closing[0].length) : text, made, 0);
    return made;
  }
  return renderParagraph(lines);
}

function renderParagraph(lines) {
  const made = node("p", { dir: "auto" });
  renderInline(lines.map((line) => line.trimStart()).join("\n"), made, 0);
  return made;
}

function renderCode(lines) {
  const [, mark, about] = FENCE.exec(lines[0]);
  const last = lines.at(-1).trim();
  const isClosed = lines.length > 1 && last.length >= mark.length && last === mark[0].repeat(last.length);
  const indent = indentOf(lines[0]);
  const own = (line) => line.slice(Math.min(indent, indentOf(line)));
  const text = lines.slice(1, isClosed ? -1 : undefined).map(own).join("\n");
  const language = about.trim().split(/\s/)[0];
  const button = node("button", { type: "button", "aria-label": "Copy the code" }, "Copy");
  button.addEventListener("click", () => copyText(text, button));
  const bar = node("div", { class: "bar" }, node("span", {}, language || "text"), button);
  return node("div", { class: "code" }, bar, node("pre", { tabindex: 0 }, node("code", { dir: "ltr" }, text)));
}

function renderList(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const start = isNumber(first) ? parseInt(first[2], 10) : null;
  const made = node(start === null ? "ul" : "ol", { start, dir: "auto" });
  let own = null;
  let width = 0;
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length + 1) {
      width = item[0].length - (item[3].length > 4 ? item[3].length - 1 : 0);
      own = [line.slice(width)];
      items.push(own);
    } else {
      own.push(line.slice(Math.min(width, indentOf(line))));
    }
  }
  for (const item of items) {
    const blocks = blocksOf(item);
    const inner = renderBlocks(blocks, depth + 1);
    const isTight = blocks.length > 0 && blocks[0].kind === "paragraph";
    made.append(node("li", {}, ...(isTight ? [...inner[0].childNodes, ...inner.slice(1)] : inner)));
  }
  return made;
}

function renderTable(lines) {
  const sideOf = (mark) => (!mark.endsWith(":") ? null : mark.startsWith(":") ? "middle" : "end");
  const sides = cellsOf(lines[1]).map(sideOf);
  const row = (line, tag) => {
    const cells = cellsOf(line);
    return node("tr", {}, ...sides.map((side, at) => {
      const cell = node(tag, { class: side, dir: "auto" });
      renderInline(cells[at] ?? "", cell, 0);
      return cell;
    }));
  };
  const body = node("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return node("div", { class: "table", tabindex: 0 }, node("table", {}, node("thead", {}, row(lines[0], "th")), body));
}

// Text within a block.

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const isSpace = (letter) => letter === undefined || /\s/.test(letter);
const isLetter = (letter) => letter !== undefined && /[\p{L}\p{N}_]/u.test(letter);

function renderInline(text, parent, depth) {
  let plain = "";
  const missing = new Set(); // marks that nothing closes from here on
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  let at = 0;
  while (at < text.length) {
    const found = depth > MAX_DEPTH ? null : inlineAt(text, at, missing, depth);
    if (found) {
      flush();
      parent.append(...found.nodes);
      at = found.end;
    } else if (text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if ("`*_~".includes(text[at])) {
      let end = at;
      while (text[end] === text[at]) end++;
      plain += text.slice(at, end);
      at = end;
    } else {
      plain += text[at++];
    }
  }
  flush();
}

function inlineAt(text, at, missing, depth) {
  const letter = text[at];
  if (letter === "\n") return { nodes: [node("br")], end: at + 1 };
  if (letter === "`") return codeAt(text, at, missing);
  if (letter === "[") return linkAt(text, at, depth, "");
  if (letter === "!" && text[at + 1] === "[") return linkAt(text, at + 1, depth, "picture: ");
  if (letter === "<" || (letter === "h" && !isLetter(text[at - 1]))) return addressAt(text, at);
  if ("*_~".includes(letter)) return markedAt(text, at, missing, depth);
  return null;
}

function codeAt(text, at, missing) {
  let from = at;
  while (text[from] === "`") from++;
  const mark = text.slice(at, from);
  if (missing.has(mark)) return null;
  let end = text.indexOf(mark, from);
  while (end >= 0 && text[end + mark.length] === "`") {
    while (text[end] === "`") end++;
    end = text.indexOf(mark, end);
  }
  if (end < 0) {
    missing.add(mark);
    return null;
  }
  const inside = text.slice(from, end).replaceAll("\n", " ");
  const isPadded = inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ");
  return { nodes: [node("code", {}, isPadded ? inside.slice(1, -1) : inside)], end: end + mark.length };
}

function markedAt(text, at, missing, depth) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at) || missing.has(mark) || isSpace(text[at + mark.length])) continue;
    if (mark[0] === "_" && isLetter(text[at - 1])) continue;
    const end = closingOf(text, at + mark.length, mark);
    if (end < 0) {
      missing.add(mark);
      continue;
    }
    const made = node(tag);
    renderInline(text.slice(at + mark.length, end), made, depth + 1);
    return { nodes: [made], end: end + mark.length };
  }
  return null;
}

function closingOf(text, from, mark) {
  for (let at = from + 1; at <= text.length - mark.length; at++) {
    if (text[at] === "`") {
      let run = at;
      while (text[run] === "`") run++;
      const end = text.indexOf(text.slice(at, run), run);
      at = (end >= 0 && end - at < MAX_LINK_LENGTH ? end + run - at : run) - 1;
      continue;
    }
    if (text[at] === "\\") {
      at++;
      continue;
    }
    if (!text.startsWith(mark, at)) continue;
    let run = at;
    while (text[run] === mark[0]) run++;
    const fits = run - at >= mark.length && (mark.length > 1 || (run - at) % 2 === 1);
    const isWord = mark[0] === "_" && isLetter(text[run]);
    if (fits && !isSpace(text[at - 1]) && !isWord) return run - mark.length;
    at = run - 1;
  }
  return -1;
}

function addressOf(text) {
  const address = text.trim();
  return /^(https?:\/\/|mailto:)[^\s\p{Cc}]+$/iu.test(address) ? address : null;
}

function link(address, ...children) {
  return node("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

function linkAt(text, at, depth, before) {
  let open = 0;
  let end = at;
  for (const last = Math.min(text.length, at + MAX_LINK_LENGTH); end < last; end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "[") open++;
    else if (text[end] === "]" && --open === 0) break;
  }
  if (open !== 0 || text[end + 1] !== "(") return null;
  let close = end + 2;
  let nested = 0;
  for (const last = Math.min(text.length, close + MAX_LINK_LENGTH); close < last; close++) {
    if (text[close] === "(") nested++;
    else if (text[close] === ")" && nested-- === 0) break;
    else if (text[close] === "\n") return null;
  }
  if (text[close] !== ")") return null;
  const address = addressOf(text.slice(end + 2, close).trim().split(/\s/)[0].replace(/^<|>$/g, ""));
  if (!address) return null;
  const made = link(address, before);
  renderInline(text.slice(at + 1, end), made, MAX_DEPTH);
  made.title = address;
  return { nodes: [made], end: close + 1 };
}

function addressAt(text, at) {
  const isBracketed = text[at] === "<";
  const pattern = isBracketed ? /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy : /(https?:\/\/[^\s<>"'`]{1,2000})/iy;
  pattern.lastIndex = at;
  const found = pattern.exec(text);
  if (!found) return null;
  let address = found[1];
  if (!isBracketed) {
    const endsSentence = () => /[.,;:!?*_~\]]$/.test(address) || (address.endsWith(")") && !address.includes("("));
    while (endsSentence()) address = address.slice(0, -1);
  }
  if (!addressOf(address)) return null;
  return { nodes: [link(address, address)], end: isBracketed ? pattern.lastIndex : at + address.length };
}

// A text that grows: blocks that have not changed keep their nodes.

class MarkdownView {
  constructor(parent) {
    this.parent = parent;
    this.known = [];
    parent.classList.add("markdown");
  }

  show(text) {
    const blocks = blocksOf(withIndentInSpaces(text.replaceAll("\r\n", "\n").split("\n")));
    const names = blocks.map(({ kind, lines }) => kind + "\n" + lines.join("\n"));
    let same = 0;
    while (same < names.length && names[same] === this.known[same]) same++;
    while (this.parent.children.length > same) this.parent.lastChild.remove();
    this.parent.append(...renderBlocks(blocks.slice(same), 0));
    this.known = names;
  }
}

async function copyText(text, button) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, browsers have no clipboard for scripts; selecting and copying works everywhere.
    const field = node("textarea", { class: "hidden", readonly: "", "aria-hidden": "true" });
    field.value = text;
    (button.closest("dialog") ?? document.body).append(field);
    field.select();
    copied = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  const before = button.dataset.label ?? button.textContent;
  button.dataset.label = before;
  button.textContent = copied ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}
