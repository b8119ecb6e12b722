// Curves over the steps, as SVG.

const SVG = "http://www.w3.org/2000/svg";
function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const WIDTH = 240, HEIGHT = 130, LEFT = 34, BOTTOM = 18, TOP = 8, RIGHT = 6;

// A figure of several series: {values: [y or null by step], style}; dots: [x, y, colour, title]; onStep(step) at a click.
// now, mark: steps with a line, of what is shown and of what is pointed at.
function plot(title, series, { now = null, mark = null, dots = [], onStep = null, xs = null } = {}) {
  const all = [...series.flatMap((s) => s.values), ...dots.map((d) => d[1])].filter((v) => v !== null && v !== undefined && !Number.isNaN(v));
  const count = Math.max(...series.map((s) => s.values.length), ...dots.map((d) => d[0] + 1), 1);
  let low = all.length ? Math.min(...all) : 0, high = all.length ? Math.max(...all) : 1;
  const isOne = high - low < 1e-4 * Math.max(1e-3, Math.abs(high)), marks = !all.length ? [] : isOne ? [low] : [low, high]; // of one value there is one mark
  if (isOne) [low, high] = [low - 0.5, high + 0.5];
  const x = (step) => LEFT + (count > 1 ? (step / (count - 1)) * (WIDTH - LEFT - RIGHT) : (WIDTH - LEFT - RIGHT) / 2);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", { viewBox: "0 0 " + WIDTH + " " + HEIGHT, role: "img", "aria-label": title + ": " + (marks.map((value) => number(value)).join(" to ") || "nothing yet") });
  svg.append(shape("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  for (const value of marks) svg.append(shape("text", { x: LEFT - 4, y: y(value) + 3, "text-anchor": "end" }, number(value)));
  for (const step of !all.length ? [] : count > 1 ? [0, count - 1] : [0]) svg.append(shape("text", { x: x(step), y: HEIGHT - 5, "text-anchor": "middle" }, xs ? xs[step] : step + 1));
  for (const { values, style } of series) {
    const parts = [];
    values.forEach((value, step) => {
      if (value === null || value === undefined || Number.isNaN(value)) return;
      parts.push((parts.length ? "L" : "M") + x(step).toFixed(1) + " " + y(value).toFixed(1));
      if (style.startsWith("line") && count <= 40) svg.append(shape("circle", { class: style.replace("line", "dot"), cx: x(step), cy: y(value), r: 2 }));
    });
    svg.append(shape("path", { class: style, d: parts.join(" ") }));
  }
  for (const [step, value, fill, text] of dots) {
    const dot = shape("circle", { cx: x(step), cy: y(value), r: 2.2, fill, "fill-opacity": 0.7 });
    dot.append(shape("title", {}, text));
    svg.append(dot);
  }
  for (const [name, step] of [["now", now], ["mark", mark]]) {
    if (step !== null && step < count) svg.append(shape("line", { class: name, x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  svg.stepAt = (event) => {
    const box = svg.getBoundingClientRect(), place = ((event.clientX - box.left) / box.width) * WIDTH;
    return Math.min(count - 1, Math.max(0, Math.round(((place - LEFT) / (WIDTH - LEFT - RIGHT)) * (count - 1))));
  };
  if (onStep) {
    svg.addEventListener("pointermove", (event) => event.buttons && onStep(svg.stepAt(event)));
    svg.addEventListener("pointerdown", (event) => onStep(svg.stepAt(event)));
    svg.style.cursor = "crosshair";
  }
  return element("figure", {}, element("figcaption", { textContent: title }), svg);
}

const mean = (values) => (values && values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

// For each step of an image: group size, mean τ and w, what hand-made rules say, evaluations, seconds.
function seriesOf(run, image) {
  return run.steps.map((event, index) => {
    const item = event.images.find((part) => part.image === image), before = run.steps[index - 1];
    const since = (name) => (event[name] === undefined ? null : event[name] - (before && before[name] <= event[name] ? before[name] : 0));
    return {
      group: item ? item.positions.length : null, tau: item ? mean(item.tau) : null, cfg: item ? mean(item.cfg) : null,
      base: (item && item.base) || {}, mar: since("mar"), mlp: since("mlp"), seconds: event.seconds === undefined ? null : event.seconds,
    };
  });
}

const HAND_MADE = " (dashed: hand-made)";
const CURVES = [
  ["group", "tokens a step", true], ["tau", "τ", true], ["cfg", "w", true], ["mar", "backbone evaluations", false],
  ["mlp", "token head evaluations", false], ["seconds", "seconds", false],
];

function drawCurves() {
  const run = state.runs.a;
  if (!run || !run.steps.length) return;
  const series = seriesOf(run, state.image);
  const token = tokensOf(run, state.image).get(state.hover === null ? state.token : state.hover);
  const mark = state.hoverStep !== null ? state.hoverStep : token ? token.index : null;
  const figures = CURVES.map(([name, title, hasBase]) => {
    const lines = [{ values: series.map((row) => row[name]), style: "line" }];
    const base = series.map((row) => row.base[name]);
    if (hasBase && base.some((v) => v !== undefined)) lines.unshift({ values: base, style: "dashed" });
    if (!lines.some((line) => line.values.some((v) => v !== null && v !== undefined))) return null;
    return plot(title + (lines.length > 1 ? HAND_MADE : ""), lines, { now: state.step, mark, onStep: showStep });
  });
  $("curves").replaceChildren(...figures.filter(Boolean));
}

// Of the place that holds the curves: they are drawn anew at each move, and one that is gone sees no pointer leave.
function wireCurves() {
  $("curves").addEventListener("pointermove", (event) => {
    const svg = event.target.closest("svg");
    hoverAtStep(svg ? svg.stepAt(event) : null);
  });
  $("curves").addEventListener("pointerleave", () => hoverAtStep(null));
}
