// Pictures on canvases: one image of a sheet, and what is marked on it.

function sizeOf(sheet, count) {
  const rows = Math.ceil(count / sheet.columns);
  return { width: sheet.image.width / sheet.columns, height: sheet.image.height / rows };
}

// Give a canvas this size, and the page's room for it the same shape.
function resize(canvas, width, height) {
  canvas.style.aspectRatio = width + " / " + height;
  if (canvas.width === width && canvas.height === height) return; // a new size wipes it
  canvas.width = width;
  canvas.height = height;
}

// Draw image `index` of a sheet of `count` over the whole canvas, in whole pixels where it is enlarged; side: that of
// the canvas, the longer one.
function drawSheet(canvas, sheet, index, count, side = 0) {
  const { width, height } = sizeOf(sheet, count);
  const scale = side ? side / Math.max(width, height) : Math.max(1, Math.ceil(320 / width));
  resize(canvas, Math.round(width * scale), Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  const x = (index % sheet.columns) * width, y = Math.floor(index / sheet.columns) * height;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(sheet.image, x, y, width, height, 0, 0, canvas.width, canvas.height);
  return context;
}

// The rectangle of a token on a picture that is drawn on all of a canvas: each grid of the layout covers all of it.
function cellOnPicture(layout, position, canvas) {
  const grid = gridOf(layout, position), { row, column } = placeIn(grid, position);
  const w = canvas.width / grid.columns, h = canvas.height / grid.rows;
  return { x: column * w, y: row * h, w, h };
}

function gridOf(layout, position) {
  return layout.find((grid) => position >= grid.start && position < grid.start + grid.rows * grid.columns);
}

// The grid that a step draws in, of the image shown; undefined where it draws nothing.
function gridDrawn(run, step) {
  const item = run.steps[step] && run.steps[step].images.find((part) => part.image === state.image);
  return item && gridOf(run.begin.layout, item.positions[0]);
}

const shapeOf = (grid) => grid.rows + "×" + grid.columns;

// Row and column of a position, from 0, in the grid that has it.
function placeIn(grid, position) {
  const place = position - grid.start;
  return { row: Math.floor(place / grid.columns), column: place % grid.columns };
}

// The position in a grid at a row and a column, or the one next to where there is none.
function positionIn(grid, row, column) {
  const within = (value, count) => Math.min(count - 1, Math.max(0, value));
  return grid.start + within(row, grid.rows) * grid.columns + within(column, grid.columns);
}

function outlineCells(context, layout, positions, style, width) {
  context.strokeStyle = style;
  context.lineWidth = width;
  for (const position of positions) {
    const cell = cellOnPicture(layout, position, context.canvas);
    context.strokeRect(cell.x + width / 2, cell.y + width / 2, cell.w - width, cell.h - width);
  }
}

function hatchCells(context, layout, positions) {
  context.strokeStyle = "rgba(255, 255, 255, 0.4)";
  context.lineWidth = 1;
  context.beginPath();
  for (const position of positions) {
    const cell = cellOnPicture(layout, position, context.canvas);
    context.moveTo(cell.x, cell.y + cell.h);
    context.lineTo(cell.x + cell.w, cell.y);
  }
  context.stroke();
}

// The picture of the step shown, with what is marked.
function drawPicture() {
  const run = state.runs.a, canvas = $("picture");
  if (!run || !run.begin || !run.steps.length) return;
  const sheet = sheetOf(run, state.step);
  if (!sheet) return;
  const context = drawSheet(canvas, sheet, state.image, run.begin.labels.length);
  const layout = run.begin.layout, tokens = tokensOf(run, state.image), width = Math.max(2, canvas.width / 160);
  if ($("outline").checked) {
    const finest = layout[layout.length - 1], one = layout.length === 1;
    const unknown = one ? [...tokens].filter(([, t]) => t.index > state.step).map(([p]) => p) : [];
    hatchCells(context, layout, unknown);
    const drawn = [...tokens].filter(([, t]) => t.index === state.step).map(([p]) => p);
    if (one || drawn.length < finest.rows * finest.columns) outlineCells(context, layout, drawn, "#f5821f", width);
  }
  context.fillStyle = "rgba(214, 51, 132, 0.5)";
  for (const position of state.painted) if (!gridOf(layout, position)) state.painted.delete(position); // of a larger image
  for (const position of state.painted) {
    const cell = cellOnPicture(layout, position, context.canvas);
    context.fillRect(cell.x, cell.y, cell.w, cell.h);
  }
  outlineCells(context, layout, markedPositions(tokens), "#1f8fff", width * 1.3);
  const item = run.steps[state.step].images.find((part) => part.image === state.image);
  const what = item ? item.positions.length + " tokens drawn" : "nothing drawn";
  canvas.setAttribute("aria-label", "Image " + (state.image + 1) + " after step " + (state.step + 1) + ", " + what);
}
