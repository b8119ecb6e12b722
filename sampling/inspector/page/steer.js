// Steering: from the step shown on another τ, w or class; the next tokens by hand; a region made again; an upload.

const painting = () => document.querySelector("input[name=tool]:checked").value === "paint";

// The grid that one points into: of several scales the one that the step shown draws; the finest to paint.
function gridToPoint(run) {
  const layout = run.begin.layout;
  return (!painting() && gridDrawn(run, state.step)) || layout[layout.length - 1];
}

// The position of that grid that one points at.
function pointedAt(event) {
  const run = state.runs.a, canvas = $("picture"), box = canvas.getBoundingClientRect();
  if (!run || !run.begin) return null;
  const grid = gridToPoint(run), x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
  return positionIn(grid, Math.floor(y * grid.rows), Math.floor(x * grid.columns));
}

function paint(position, on) {
  if (position === null) return;
  if (on) state.painted.add(position);
  else state.painted.delete(position);
  drawPicture();
}

function wirePicture() {
  const canvas = $("picture");
  let brush = null; // true paints, false wipes
  canvas.addEventListener("pointerdown", (event) => {
    const position = pointedAt(event);
    if (!painting()) return selectToken(position);
    brush = !state.painted.has(position);
    canvas.setPointerCapture(event.pointerId);
    paint(position, brush);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (brush !== null) paint(pointedAt(event), brush);
    hoverAt(pointedAt(event));
  });
  canvas.addEventListener("pointerup", () => { brush = null; });
  canvas.addEventListener("pointercancel", () => { brush = null; });
  canvas.addEventListener("pointerleave", () => hoverAt(null));
  canvas.addEventListener("keydown", (event) => {
    const run = state.runs.a;
    if (!run || !run.begin) return;
    const grid = gridToPoint(run), own = state.token !== null && gridOf(run.begin.layout, state.token) === grid;
    const { row, column } = placeIn(grid, own ? state.token : grid.start);
    const moves = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column] };
    if (event.key in moves) selectToken(own ? positionIn(grid, ...moves[event.key]) : grid.start);
    else if ((event.key === "Enter" || event.key === " ") && own && painting()) paint(state.token, !state.painted.has(state.token));
    else return;
    event.preventDefault();
  });
}

// The changes without what those that are chosen say of these names.
function changesWithout(names, isChosen) {
  const others = state.steer.map((one) => (isChosen(one) ? Object.fromEntries(Object.entries(one).filter(([name]) => !names.includes(name))) : one));
  return others.filter((one) => Object.keys(one).length > 1);
}

// Make the image again with this change, which takes the place of those of its step and kind.
function changeAt(step, change) {
  const others = changesWithout(Object.keys(change), (one) => one.step === step);
  state.steer = [...others, { step, ...change }].sort((a, b) => a.step - b.step);
  showChanges();
  return generateWatch(state.wanted);
}

// Make the image again so that at this step its class is that of the form: without the changes of class up to there.
function asAskedFor(step) {
  state.steer = changesWithout(["label"], (one) => one.step <= step);
  showChanges();
  return generateWatch(state.wanted);
}

// The class that changes have given by this step, as the list has it; "" for that of the form.
function labelAt(step) {
  const label = state.steer.reduce((last, one) => (one.step <= step && one.label !== undefined ? one.label : last), "");
  return String(label);
}

// Is the step that is wanted still to come, of a run that was begun again?
const isComing = (run) => !run.end && state.wanted < Infinity && state.wanted > run.steps[run.steps.length - 1].step;

// The step of the loop that one is at, from 0: the one shown, or the one that is to come.
function stepOfLoop() {
  const run = state.runs.a;
  if (!run || !run.steps.length) return 0;
  return isComing(run) ? state.wanted : run.steps[indexWanted(run)].step;
}

// The same, to change: a region made again comes after the last step.
function stepWanted() {
  const run = state.runs.a;
  return Math.min(stepOfLoop(), ((run && run.begin.settings.num_iter) || Infinity) - 1);
}

// Stay at this step, which is going to be changed, whatever comes meanwhile.
function stay() {
  pause();
  state.wanted = stepOfLoop();
  return stepWanted();
}

let waiting = null; // a slider that is still being dragged
function steerSoon(name, value) {
  const step = stay();
  clearTimeout(waiting);
  waiting = setTimeout(() => changeAt(step, { [name]: value }), 150);
}

// A region is cells of the token grid: of several scales those of the finest, counted from its first.
function paintedCells() {
  const layout = state.runs.a.begin.layout, start = layout[layout.length - 1].start;
  return [...state.painted].map((position) => position - start).filter((cell) => cell >= 0).sort((a, b) => a - b);
}

function nothingPainted() {
  if (state.painted.size && state.runs.a) return false;
  showError("nothing is painted: choose “paints tokens” and drag over the image");
  return true;
}

// Were all painted tokens of all images known before this step? Then nothing of them can be drawn at it.
function nothingUnknown(step) {
  const run = state.runs.a;
  const drawnAt = (image, position) => run.steps.find((event) => event.images.some((part) => part.image === image && part.positions.includes(position)));
  const isKnown = (event) => (event ? event.step < step : Boolean(run.end)); // what no step drew was kept
  if (!run.begin.labels.every((_, image) => [...state.painted].every((position) => isKnown(drawnAt(image, position))))) return false;
  showError("the " + state.painted.size + " painted tokens are known before step " + (step + 1) + ": paint hatched ones, or go to an earlier step");
  return true;
}

function describe(change, classes) {
  const parts = [];
  if (change.tau !== undefined) parts.push("τ " + number(change.tau));
  if (change.cfg !== undefined) parts.push("w " + number(change.cfg));
  if (change.label !== undefined) parts.push((ofText("a") ? "prompt " : "class ") + (change.label < 0 ? "any" : classes[change.label]));
  const from = parts.length ? "from step " + (change.step + 1) + ": " + parts.join(", ") : "";
  const next = change.next ? change.next.length + " painted tokens at step " + (change.step + 1) : "";
  return [from, next].filter(Boolean).join("; ");
}

function showChanges() {
  const classes = conditions();
  const removable = (text, remove) => {
    const button = element("button", { type: "button", textContent: "undo", "aria-label": "Undo: " + text });
    button.addEventListener("click", () => {
      stay();
      remove();
      showChanges();
      ($("changes").querySelector("button") || $("changes")).focus(); // the button is gone
      generateWatch(state.wanted);
    });
    return element("li", { textContent: text }, button);
  };
  const items = state.steer.map((change) => removable(describe(change, classes), () => { state.steer = state.steer.filter((one) => one !== change); }));
  state.redo.forEach((redo) => items.push(removable(redo.region.length + " cells made again, seed " + redo.seed, () => { state.redo = state.redo.filter((one) => one !== redo); })));
  if (state.edit) items.push(removable("an uploaded image, " + state.edit.region.length + " cells made", () => { state.edit = null; }));
  $("changes").replaceChildren(...items);
}

function showSteerStep() {
  const run = state.runs.a;
  $("steer-step").textContent = "step " + (stepWanted() + 1);
  if ($("steer-label").value !== labelAt(stepWanted())) $("steer-label").value = labelAt(stepWanted());
  if (waiting !== null || !run || isComing(run)) return;
  const row = seriesOf(run, state.image)[state.step];
  for (const [name, value] of [["tau", row.tau], ["cfg", row.cfg]]) {
    if (value === null || document.activeElement === $("steer-" + name)) continue;
    $("steer-" + name).value = value;
    $("steer-" + name + "-value").textContent = number(value);
  }
}

async function readUpload() {
  const file = $("upload").files[0];
  state.upload = null;
  if (!file) return;
  if (file.size > MOST_UPLOAD) return showError("the picture has " + file.size + " bytes, at most " + MOST_UPLOAD + " are taken");
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  state.upload = btoa(text);
}

// What labels number: classes, or prompts.
const conditions = () => (ofText("a") ? promptsOf() : about($("a-checkpoint").value).classes);

function fillClasses() {
  $("steer-label-name").textContent = ofText("a") ? "prompt" : "class";
  const options = conditions().map((name, i) => element("option", { value: i, textContent: i + (name === String(i) ? "" : " " + name) }));
  $("steer-label").replaceChildren(element("option", { value: "", textContent: "as asked for" }), element("option", { value: -1, textContent: "any" }), ...options);
}

function wireSteer() {
  for (const name of ["tau", "cfg"]) {
    $("steer-" + name).addEventListener("input", () => {
      const value = Number($("steer-" + name).value);
      $("steer-" + name + "-value").textContent = number(value);
      steerSoon(name, value);
    });
    $("steer-" + name).addEventListener("change", () => setTimeout(() => { waiting = null; }, 200));
  }
  $("steer-label").addEventListener("change", () => {
    if ($("steer-label").value === "") asAskedFor(stay());
    else changeAt(stay(), { label: Number($("steer-label").value) });
  });
  $("paint-next").addEventListener("click", () => nothingPainted() || nothingUnknown(stepWanted()) || changeAt(stay(), { next: [...state.painted].sort((a, b) => a - b) }));
  $("paint-clear").addEventListener("click", () => {
    state.painted.clear();
    drawPicture();
  });
  $("paint-redo").addEventListener("click", () => {
    if (nothingPainted()) return;
    state.redo = [...state.redo, { region: paintedCells(), seed: state.redo.length + 1 }];
    showChanges();
    generateWatch();
  });
  $("upload").addEventListener("change", readUpload);
  $("edit").addEventListener("click", () => {
    if (!state.upload) return showError("choose an image first");
    if (nothingPainted()) return;
    state.edit = { image: state.upload, region: paintedCells() };
    showChanges();
    generateWatch();
  });
  for (const name of ["a-checkpoint", "a-prompts"]) $(name).addEventListener("change", fillClasses);
  fillClasses();
}
