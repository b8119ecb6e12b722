// Maps: one value of each token as a colour; the numbers of one token.

const MAPS = [
  ["step", "step", "the step that drew the token"],
  ["tau", "τ", "the temperature it was drawn at"],
  ["cfg", "w", "the guidance scale it was drawn under; 1 is none"],
  ["rank", "rank of its score", "its place among the unknown tokens in the order's scores; 0 comes first"],
  ["sure", "spread of draws", ""],
  ["logit", "order head", "what the learned order adds to the score"],
];
const RAMP = [[40, 42, 110], [38, 105, 146], [52, 160, 128], [158, 201, 84], [250, 230, 110]];

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const left = Math.min(Math.floor(place), RAMP.length - 2), rest = place - left;
  return RAMP[left].map((low, i) => Math.round(low + (RAMP[left + 1][i] - low) * rest));
}
const css = (rgb) => "rgb(" + rgb.join(",") + ")";

// What the token head was sure of has a name for each kind of head.
const titleOf = (name, title, begin) => (name === "sure" && begin.discrete ? "log p" : title);

function meaningOf(name, begin) {
  if (name !== "sure") return MAPS.find((map) => map[0] === name)[2];
  return begin.discrete ? "log p of the id that was drawn" : "standard deviation over further draws of the token; 0 is sure";
}

// Where the grids of several scales stand in a map of this size: boxes of one size, row by row.
function cellInMap(layout, position, width, height) {
  const grid = gridOf(layout, position), index = layout.indexOf(grid), { row, column } = placeIn(grid, position);
  const boxes = Math.ceil(Math.sqrt(layout.length)), filled = (layout.length > 1 ? 0.92 : 1) / boxes;
  const w = (width * filled) / grid.columns, h = (height * filled) / grid.rows;
  const x = ((index % boxes) * width) / boxes, y = (Math.floor(index / boxes) * height) / boxes;
  return { x: x + column * w, y: y + row * h, w, h };
}

function positionInMap(layout, length, x, y) {
  for (let position = 0; position < length; position++) {
    const cell = cellInMap(layout, position, 1, 1);
    if (x >= cell.x && x < cell.x + cell.w && y >= cell.y && y < cell.y + cell.h) return position;
  }
  return null;
}

const mapCanvases = {};

function buildMaps() {
  for (const [name, title] of MAPS) {
    const canvas = element("canvas", { width: 160, height: 160, role: "img", "aria-label": "Map of " + title });
    const ramp = element("span", { className: "ramp" });
    ramp.style.background = "linear-gradient(to right," + RAMP.map(css).join(",") + ")";
    const low = element("span"), high = element("span"), text = element("span", { textContent: title });
    const ends = element("span", { className: "ends" }, low, ramp, high);
    const figure = element("figure", {}, canvas, element("figcaption", {}, text, ends));
    mapCanvases[name] = { canvas, low, high, text, figure };
    const at = (event) => {
      const run = state.runs.a, box = canvas.getBoundingClientRect();
      if (!run || !run.begin) return null;
      return positionInMap(run.begin.layout, lengthOf(run), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
    canvas.addEventListener("pointermove", (event) => hoverAt(at(event)));
    canvas.addEventListener("pointerleave", () => hoverAt(null));
    canvas.addEventListener("click", (event) => selectToken(at(event)));
    $("maps").append(figure);
  }
}

function drawMaps() {
  const run = state.runs.a;
  if (!run || !run.begin) return;
  const tokens = tokensOf(run, state.image), layout = run.begin.layout, finest = layout[layout.length - 1];
  const width = 160, height = Math.round((width * finest.rows) / finest.columns);
  const cellOf = (position) => cellInMap(layout, position, width, height);
  for (const [name, title] of MAPS) {
    const { canvas, low, high, text, figure } = mapCanvases[name];
    const values = [...tokens].map(([position, token]) => [position, token[name], token.index]).filter(([, v]) => v !== null && v !== undefined);
    figure.hidden = !values.length && !["step", "tau", "cfg"].includes(name);
    figure.title = meaningOf(name, run.begin);
    resize(canvas, width, height);
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const numbers = values.map(([, value]) => value + (name === "step" ? 1 : 0));
    const least = Math.min(...numbers), most = Math.max(...numbers), constant = most - least < 1e-4 * Math.max(1, Math.abs(most));
    for (const [position, value, index] of values) {
      const shown = value + (name === "step" ? 1 : 0), cell = cellOf(position);
      context.globalAlpha = index > state.step ? 0.25 : 1;
      context.fillStyle = css(colour(constant ? 0.5 : (shown - least) / (most - least)));
      context.fillRect(cell.x, cell.y, cell.w + 0.5, cell.h + 0.5);
    }
    context.globalAlpha = 1;
    if (name === "step" && run.steps.length === tokens.size) drawPath(context, cellOf, tokens);
    context.strokeStyle = "#f5821f";
    context.lineWidth = 1.5;
    for (const [position, token] of tokens) if (token.index === state.step) strokeCell(context, cellOf(position));
    context.strokeStyle = "#1f8fff";
    context.lineWidth = 3;
    for (const position of markedPositions(tokens)) strokeCell(context, cellOf(position));
    text.textContent = titleOf(name, title, run.begin) + (numbers.length && constant ? ": " + number(least) + " for all" : "");
    low.textContent = numbers.length ? number(least) : "";
    high.textContent = numbers.length ? number(most) : "";
  }
}

function strokeCell(context, cell) {
  context.strokeRect(cell.x + 1, cell.y + 1, Math.max(cell.w - 2, 1), Math.max(cell.h - 2, 1));
}

// The order of a model that draws one token a step, as a line through them.
function drawPath(context, cellOf, tokens) {
  const ordered = [...tokens].filter(([, token]) => token.index <= state.step).sort((a, b) => a[1].index - b[1].index);
  context.strokeStyle = "rgba(255, 255, 255, 0.8)";
  context.lineWidth = 1;
  context.beginPath();
  for (const [position] of ordered) {
    const cell = cellOf(position);
    context.lineTo(cell.x + cell.w / 2, cell.y + cell.h / 2);
  }
  context.stroke();
}

function neighboursKnown(run, tokens, position) {
  const grid = gridOf(run.begin.layout, position), own = tokens.get(position), known = [];
  const { row, column } = placeIn(grid, position);
  for (const [name, down, right] of [["above", -1, 0], ["left", 0, -1], ["right", 0, 1], ["below", 1, 0]]) {
    const r = row + down, c = column + right;
    if (r < 0 || c < 0 || r >= grid.rows || c >= grid.columns) continue;
    const other = tokens.get(positionIn(grid, r, c));
    if (!other || (own && other.index < own.index)) known.push(name);
  }
  return known.length ? known.join(", ") : "none";
}

function showToken() {
  const run = state.runs.a, position = state.hover === null ? state.token : state.hover;
  if (!run || !run.begin || position === null) return;
  const grid = gridOf(run.begin.layout, position), { row, column } = placeIn(grid, position);
  const tokens = tokensOf(run, state.image), token = tokens.get(position);
  const where = "row " + (row + 1) + ", column " + (column + 1);
  const scale = run.begin.layout.length > 1 ? ["scale", shapeOf(grid)] : null;
  const rows = [["token", position], ["place", where], scale];
  if (!token) rows.push(["step", run.end ? "known from the start" : "not drawn yet"]);
  else {
    rows.push(["step", token.step + 1], ["τ", number(token.tau, 4)], ["w", number(token.cfg, 4)], ["rank of score", number(token.rank)]);
    rows.push([run.begin.discrete ? "log p" : "spread of draws", number(token.sure)], ["order head", number(token.logit)]);
    rows.push(["known neighbours", neighboursKnown(run, tokens, position)]);
  }
  const list = rows.filter(Boolean).map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
  $("token").replaceChildren(element("dl", {}, ...list));
}

function hoverAt(position) {
  if (state.hover === position) return;
  state.hover = position;
  drawPicture();
  drawMaps();
  showToken();
  drawCurves();
}

// Point at a step, an index, as in a curve: its tokens are marked.
function hoverAtStep(step) {
  if (state.hoverStep === step) return;
  state.hoverStep = step;
  drawPicture();
  drawMaps();
  drawCurves();
}

// The tokens that are pointed at or selected, as positions.
function markedPositions(tokens) {
  const ofStep = [...tokens].filter(([, token]) => token.index === state.hoverStep).map(([position]) => position);
  return [state.hover, state.token, ...ofStep].filter((position) => position !== null);
}

function selectToken(position) {
  state.token = position;
  state.hover = null; // which a pointer sets when it moves
  drawPicture();
  drawMaps();
  showToken();
  drawCurves();
}
