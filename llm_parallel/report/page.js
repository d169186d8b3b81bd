// Draws the curves of a report as wide as the window, shows values under the pointer, and zooms along the x axis.
// Without it the page shows the same curves as pictures.
(() => {
"use strict";
const holder = document.getElementById("data");
if (!holder) return;
const data = JSON.parse(holder.textContent);
const state = {axis: data.axis, range: null};  // all charts share the axis and its range
const plots = [];
const LABELS = {step: "steps", tokens: "tokens", seconds: "time"};

const make = (name, attributes = {}, parent = null, text = "") => {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect", "clipPath", "defs"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== "") element.textContent = text;
  if (parent) parent.append(element);
  return element;
};
const colour = (index) => `var(--c${index % 6})`;
const short = (value) => {
  for (const [size, ending] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(4)}${ending}`;
  return `${+value.toPrecision(4)}`;
};
const clock = (seconds) => seconds < 120 ? `${+seconds.toPrecision(3)} s`
  : seconds < 7200 ? `${+(seconds / 60).toPrecision(3)} min` : `${+(seconds / 3600).toPrecision(3)} h`;
const onAxis = (value) => state.axis === "seconds" ? clock(value) : short(value);
const written = (value, form) => value === null ? "none"
  : form === "loss" ? value.toFixed(4) : form === "share" ? `${(100 * value).toFixed(2)} %`
  : form === "rate" ? Math.round(value).toLocaleString("en") : `${+value.toPrecision(4)}`;
const tick = (value, form) => form === "share" ? `${+(100 * value).toPrecision(3)} %` : short(value);

// Round numbers that divide [low, high] into about `count` parts.
const ticks = (low, high, count) => {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(+(n * step).toPrecision(12));
  return found;
};
const timeTicks = (low, high, count) => {
  const unit = high < 120 ? 1 : high < 7200 ? 60 : 3600;
  return ticks(low / unit, high / unit, count).map((value) => value * unit);
};
const logTicks = (low, high) => {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of [1, 2, 5]) if (factor * 10 ** power >= low && factor * 10 ** power <= high)
      found.push(factor * 10 ** power);
  return found.length > 7 ? found.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9) : found;
};
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
};
const xsOf = (curve) => data.runs[curve.run][curve.kind === "dots" ? "evals" : "steps"][state.axis];
const wholeRange = () => {
  const ends = data.runs.map((run) => run.steps[state.axis]);
  const low = Math.min(...ends.map((xs) => xs[0])), high = Math.max(...ends.map((xs) => xs[xs.length - 1]));
  return high > low ? [low, high] : [low - 1, high + 1];
};

class Plot {
  constructor(figure, chart) {
    this.chart = chart;
    this.hidden = new Set();
    this.box = make("div", {class: "plot", tabindex: 0, role: "img",
      "aria-label": `${chart.unit}; arrow keys move the cursor, plus and minus zoom, Escape shows all`});
    this.legend = make("div", {class: "legend"});
    figure.querySelector(".static").replaceWith(this.box, this.legend);
    this.fillLegend();
    this.tip = make("div", {class: "tip", hidden: ""});
    this.listen();
  }

  fillLegend() {
    const several = this.chart.curves.length + this.chart.limits.length > 1;
    this.chart.curves.forEach((curve, index) => {
      if (!several) return;
      const button = make("button", {type: "button", "aria-pressed": "true"}, this.legend);
      const style = `background:${colour(curve.colour)}${curve.kind === "faint" ? ";opacity:.45" : ""}`
        + (curve.kind === "dots" ? ";border-radius:50%" : "");
      make("i", {style}, button);
      button.append(curve.label);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(index)) this.hidden.add(index);
        button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
        this.draw();
      });
    });
    const dash = (text, ink) => { make("i", {class: "dash", style: `color:${ink}`},
      make("span", {}, this.legend)).after(text); };
    for (const limit of this.chart.limits) dash(limit.label, "var(--faint)");
    if (plots.length) return;  // the first chart explains the marks of all
    for (const run of data.runs) {
      const before = data.runs.length > 1 ? `${run.name}: ` : "";
      const counted = (kind, one, more) => {
        const count = run.marks.filter((mark) => mark.kind === kind).length;
        return count ? `${before}${count} ${count > 1 ? more : one}` : "";
      };
      const restarts = counted("restart", "restart", "restarts"), skips = counted("skip", "skipped step", "skipped steps");
      const changes = counted("layout", "change of layout", "changes of layout");
      if (restarts) dash(restarts, "var(--faint)");
      if (changes) dash(changes, "var(--layout)");
      if (skips) make("b", {style: "color:var(--skip)"}, make("span", {}, this.legend), "\u00d7 ").after(skips);
    }
  }

  // Lowest and highest value that is seen, with a little room.
  yRange(low, high) {
    const seen = this.chart.limits.map((limit) => limit.y);
    this.chart.curves.forEach((curve, index) => {
      if (this.hidden.has(index)) return;
      const xs = xsOf(curve);
      curve.y.forEach((y, n) => { if (y !== null && xs[n] >= low && xs[n] <= high) seen.push(y); });
    });
    const kept = this.log ? seen.filter((y) => y > 0) : seen;
    if (!kept.length) return [0, 1];
    const least = kept.reduce((a, b) => Math.min(a, b)), most = kept.reduce((a, b) => Math.max(a, b));
    if (this.log) return [least / 1.15, most * 1.15];
    const room = (most - least) * 0.05 || Math.abs(most) * 0.05 || 1;
    return this.chart.zero ? [Math.min(0, least), most + (most - Math.min(0, least)) * 0.06 || 1]
      : [least - room, most + room];
  }

  draw() {
    const width = Math.max(240, this.box.clientWidth), wide = width > 700;
    const height = wide ? 330 : width > 420 ? 250 : 220;
    this.log = this.chart.log;
    const [x0, x1] = state.range || wholeRange();
    const [y0, y1] = this.yRange(x0, x1);
    const yTicks = this.log ? logTicks(y0, y1) : ticks(y0, y1, 5);
    const left = 14 + 7.2 * Math.max(2, ...yTicks.map((y) => tick(y, this.chart.form).length)), right = 14;
    const top = 8, bottom = height - 38;
    const level = (y) => this.log ? Math.log(Math.max(y, 1e-300)) : y;
    this.toX = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
    this.toY = (y) => bottom - (level(y) - level(y0)) / (level(y1) - level(y0)) * (bottom - top);
    this.fromX = (pixel) => x0 + (pixel - left) / (width - left - right) * (x1 - x0);
    this.frame = {left, right: width - right, top, bottom, width};
    this.box.replaceChildren(this.tip);
    const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, width, height}, this.box);
    this.svg = svg;
    for (const y of yTicks) {
      make("line", {x1: left, x2: width - right, y1: this.toY(y), y2: this.toY(y), stroke: "var(--line)"}, svg);
      make("text", {x: left - 6, y: this.toY(y) + 4, "text-anchor": "end"}, svg, tick(y, this.chart.form));
    }
    const xTicks = (state.axis === "seconds" ? timeTicks : ticks)(x0, x1, Math.floor(width / 95));
    for (const x of xTicks) {
      if (this.toX(x) > width - right + 1) continue;
      make("line", {x1: this.toX(x), x2: this.toX(x), y1: bottom, y2: bottom + 4, stroke: "var(--faint)"}, svg);
      make("text", {x: this.toX(x), y: bottom + 17, "text-anchor": "middle"}, svg, onAxis(x));
    }
    make("line", {x1: left, x2: width - right, y1: bottom, y2: bottom, stroke: "var(--faint)"}, svg);
    make("text", {x: width - right, y: bottom + 33, "text-anchor": "end"}, svg, LABELS[state.axis]);
    make("text", {x: left, y: bottom + 33}, svg, this.chart.unit);
    const id = `inside-${plots.indexOf(this)}-${Math.round(width)}`;
    make("rect", {x: left, y: top - 4, width: width - left - right + 4, height: bottom - top + 8},
      make("clipPath", {id}, make("defs", {}, svg)));
    const inside = make("g", {"clip-path": `url(#${id})`}, svg);
    this.drawMarks(inside, x0, x1);
    this.chart.curves.forEach((curve, index) => { if (!this.hidden.has(index)) this.drawCurve(inside, curve); });
    this.cursor = make("g", {}, svg);
    this.tip.hidden = true;
  }

  drawMarks(parent, x0, x1) {
    const {left, right, top, bottom} = this.frame;
    for (const limit of this.chart.limits) make("line", {x1: left, x2: right, y1: this.toY(limit.y),
      y2: this.toY(limit.y), stroke: "var(--faint)", "stroke-dasharray": "7 3 1 3"}, parent);
    for (const run of data.runs) run.marks.forEach((mark, index) => {
      const x = run.at[state.axis][index], at = this.toX(x);
      if (x < x0 || x > x1) return;
      if (mark.kind === "skip") make("path", {d: `M${at - 3.5} ${bottom - 10}l7 7m0 -7l-7 7`, stroke: "var(--skip)",
        "stroke-width": 1.8}, parent);
      else make("line", {x1: at, x2: at, y1: top, y2: bottom, "stroke-width": 1.3,
        stroke: mark.kind === "layout" ? "var(--layout)" : "var(--faint)",
        "stroke-dasharray": mark.kind === "layout" ? "6 3" : "2 3"}, parent);
    });
  }

  drawCurve(parent, curve) {
    const xs = xsOf(curve);
    let path = "", pen = "M";
    curve.y.forEach((y, n) => {
      if (y === null || (this.log && y <= 0)) { pen = "M"; return; }
      path += `${pen}${this.toX(xs[n]).toFixed(1)} ${this.toY(y).toFixed(1)}`;
      pen = "L";
    });
    const thin = curve.kind === "faint" ? {"stroke-opacity": 0.35, "stroke-width": 1}
      : {"stroke-width": curve.kind === "dots" ? 1 : 1.9};
    make("path", {d: path, fill: "none", stroke: colour(curve.colour), "stroke-linejoin": "round", ...thin}, parent);
    if (curve.kind === "dots" || xs.length === 1) curve.y.forEach((y, n) => {
      if (y !== null) make("circle", {cx: this.toX(xs[n]), cy: this.toY(y), r: 4, fill: colour(curve.colour),
        stroke: "var(--back)"}, parent);
    });
  }

  // Shows the values at x (of the axis) in a box beside the cursor.
  show(x) {
    const {left, right, top, bottom, width} = this.frame;
    const at = Math.min(right, Math.max(left, this.toX(x)));
    this.at = this.fromX(at);
    this.cursor.replaceChildren();
    make("line", {x1: at, x2: at, y1: top, y2: bottom, stroke: "var(--faint)"}, this.cursor);
    const run = data.runs[0], place = nearest(run.steps[state.axis], this.at);
    this.tip.replaceChildren();
    const other = state.axis === "tokens" ? `${short(run.steps.tokens[place])} tokens` :
      `step ${run.steps.step[place].toLocaleString("en")}, ${short(run.steps.tokens[place])} tokens`;
    make("div", {}, this.tip, data.runs.length > 1 ? `${onAxis(this.at)} ${LABELS[state.axis]}` : other);
    this.chart.curves.forEach((curve, index) => {
      const xs = xsOf(curve);
      if (this.hidden.has(index) || !xs.length) return;
      const n = nearest(xs, this.at);
      if (curve.kind === "dots" && Math.abs(this.toX(xs[n]) - at) > 14) return;
      const row = make("div", {}, this.tip);
      make("i", {style: `background:${colour(curve.colour)}${curve.kind === "faint" ? ";opacity:.45" : ""}`}, row);
      row.append(`${curve.label} ${written(curve.y[n], this.chart.form)}`);
      if (curve.y[n] !== null) make("circle", {cx: this.toX(xs[n]), cy: this.toY(curve.y[n]), r: 3.5,
        fill: colour(curve.colour)}, this.cursor);
    });
    for (const one of data.runs) one.marks.forEach((mark, index) => {
      if (Math.abs(this.toX(one.at[state.axis][index]) - at) < 5) make("div", {}, this.tip, mark.text);
    });
    this.tip.hidden = false;
    this.tip.style.left = at < width / 2 ? `${at + 10}px` : "auto";
    this.tip.style.right = at < width / 2 ? "auto" : `${width - at + 10}px`;
  }

  listen() {
    let from = null;
    const place = (event) => event.clientX - this.box.getBoundingClientRect().left;
    this.box.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "touch" && event.button === 0) from = place(event);
      this.show(this.fromX(place(event)));
    });
    this.box.addEventListener("pointermove", (event) => {
      this.show(this.fromX(place(event)));
      if (from === null || Math.abs(place(event) - from) < 6) return;
      const [a, b] = [from, place(event)].sort((one, two) => one - two);
      make("rect", {x: a, width: b - a, y: this.frame.top, height: this.frame.bottom - this.frame.top,
        fill: "var(--link)", opacity: 0.15}, this.cursor);
    });
    this.box.addEventListener("pointerup", (event) => {
      if (from !== null && Math.abs(place(event) - from) >= 6) zoom(this.fromX(from), this.fromX(place(event)));
      from = null;
    });
    // A finger leaves when it is lifted; what it pointed at stays until another place is touched.
    this.box.addEventListener("pointerleave", (event) => {
      from = null;
      if (event.pointerType !== "touch") this.leave();
    });
    this.box.addEventListener("blur", () => this.leave());
    this.box.addEventListener("dblclick", () => zoom(null));
    this.box.addEventListener("keydown", (event) => {
      const [x0, x1] = state.range || wholeRange(), x = this.at ?? (x0 + x1) / 2;
      const moves = {ArrowLeft: -1, ArrowRight: 1}, scales = {"+": 0.25, "-": 1};
      if (event.key in moves) this.show(x + moves[event.key] * (x1 - x0) / 60);
      else if (event.key in scales) zoom(x - (x1 - x0) * scales[event.key], x + (x1 - x0) * scales[event.key]);
      else if (event.key === "Escape") zoom(null);
      else return;
      event.preventDefault();
    });
  }

  leave() { this.tip.hidden = true; this.cursor.replaceChildren(); }
}

const zoom = (a, b) => {
  const [low, high] = wholeRange();
  if (a === null) state.range = null;
  else {
    const range = [Math.max(low, Math.min(a, b)), Math.min(high, Math.max(a, b))];
    const most = Math.min(...data.runs.map((run) => (high - low) / run.steps.step.length));
    if (range[1] - range[0] < 2 * most) return;
    state.range = range[0] <= low && range[1] >= high ? null : range;
  }
  refresh();
};
const tools = make("div", {class: "tools"});
const refresh = () => {
  for (const button of tools.querySelectorAll("button[data-axis]"))
    button.setAttribute("aria-pressed", String(button.dataset.axis === state.axis));
  tools.querySelector("[data-all]").setAttribute("aria-pressed", String(state.range === null));
  for (const plot of plots) plot.draw();
};
const button = (text, attributes, act) =>
  make("button", {type: "button", ...attributes}, tools, text).addEventListener("click", act);
tools.append("over");
for (const axis of Object.keys(LABELS)) if (data.runs.every((run) => run.steps[axis]))
  button(LABELS[axis], {"data-axis": axis}, () => { state.axis = axis; state.range = null; refresh(); });
make("span", {class: "gap"}, tools);
button("all", {"data-all": ""}, () => zoom(null));
for (const [text, share] of [["last half", 0.5], ["last tenth", 0.1]])
  button(text, {}, () => { const [low, high] = wholeRange(); zoom(high - share * (high - low), high); });
make("span", {class: "hint"}, tools, "Drag across a curve to zoom, double click to see all.");

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  if (!plots.length) figure.parentElement.before(tools);
  plots.push(new Plot(figure, data.charts[figure.dataset.chart]));
}
if (!plots.length) return;
refresh();
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth !== width) { width = window.innerWidth; for (const plot of plots) plot.draw(); }
});
})();
