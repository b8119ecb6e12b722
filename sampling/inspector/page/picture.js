// Pictures on canvases: one image of a sheet, and what is marked on it.

function sizeOf(sheet, count) {
  const rows = Math.ceil(count / sheet.columns);
  return { width: sheet.image.width / sheet.columns, height: sheet.image.height / rows };
}

// Draw image `index` of a sheet of `count` over the whole canvas, in whole pixels where it is enlarged.
function drawSheet(canvas, sheet, index, count, side = 0) {
  const { width, height } = sizeOf(sheet, count);
  const size = side || Math.max(width, Math.ceil(320 / width) * width);
  if (canvas.width !== size || canvas.height !== size) canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  const x = (index % sheet.columns) * width, y = Math.floor(index / sheet.columns) * height;
  context.clearRect(0, 0, size, size);
  context.drawImage(sheet.image, x, y, width, height, 0, 0, size, size);
  return context;
}

// The rectangle of a token on a picture of this side: each grid of the layout covers all of it.
function cellOnPicture(layout, position, side) {
  const grid = gridOf(layout, position);
  const place = position - grid.start, cell = side / grid.side;
  return { x: (place % grid.side) * cell, y: Math.floor(place / grid.side) * cell, w: cell, h: cell };
}

function gridOf(layout, position) {
  return layout.find((grid) => position >= grid.start && position < grid.start + grid.side * grid.side);
}

// The position of the finest grid, or of that which the step shown draws, below a point (0…1) of the picture.
function positionAt(layout, grid, x, y) {
  const column = Math.min(grid.side - 1, Math.max(0, Math.floor(x * grid.side)));
  const row = Math.min(grid.side - 1, Math.max(0, Math.floor(y * grid.side)));
  return grid.start + row * grid.side + column;
}

function outlineCells(context, layout, positions, side, style, width) {
  context.strokeStyle = style;
  context.lineWidth = width;
  for (const position of positions) {
    const cell = cellOnPicture(layout, position, side);
    context.strokeRect(cell.x + width / 2, cell.y + width / 2, cell.w - width, cell.h - width);
  }
}

function hatchCells(context, layout, positions, side) {
  context.strokeStyle = "rgba(255, 255, 255, 0.4)";
  context.lineWidth = 1;
  context.beginPath();
  for (const position of positions) {
    const cell = cellOnPicture(layout, position, side);
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
  const side = canvas.width, layout = run.begin.layout, tokens = tokensOf(run, state.image);
  const width = Math.max(2, side / 160);
  if ($("outline").checked) {
    const finest = layout[layout.length - 1], one = layout.length === 1;
    const unknown = one ? [...tokens].filter(([, t]) => t.index > state.step).map(([p]) => p) : [];
    hatchCells(context, layout, unknown, side);
    const drawn = [...tokens].filter(([, t]) => t.index === state.step).map(([p]) => p);
    if (one || drawn.length < finest.side * finest.side) outlineCells(context, layout, drawn, side, "#f5821f", width);
  }
  context.fillStyle = "rgba(214, 51, 132, 0.5)";
  for (const position of state.painted) {
    const cell = cellOnPicture(layout, position, side);
    context.fillRect(cell.x, cell.y, cell.w, cell.h);
  }
  const marked = [state.hover, state.token].filter((position) => position !== null);
  outlineCells(context, layout, marked, side, "#1f8fff", width * 1.3);
  const item = run.steps[state.step].images.find((part) => part.image === state.image);
  const what = item ? item.positions.length + " tokens drawn" : "nothing drawn";
  canvas.setAttribute("aria-label", "Image " + (state.image + 1) + " after step " + (state.step + 1) + ", " + what);
}
