// The settings of a run, the run itself, and the scrubber over its steps.

const COMMON = ["infer_mode", "order", "group", "num_iter", "num_sampling_steps", "solver", "temperature", "cfg"];
const about = (name) => content.checkpoints.find((one) => one.name === name) || content.checkpoints[0];

function field(which, name, made, title) {
  made.id = which + "-" + name;
  made.name = made.id;
  made.title = title || "";
  return element("label", { for: made.id }, element("span", { textContent: name.replaceAll("_", " ") }), made);
}

// The form of run A or B; B has the labels and the seed of A.
function buildForm(which) {
  const place = $("form-" + which), first = which === "a";
  const select = element("select", {}, ...content.checkpoints.map((one) => element("option", { value: one.name, textContent: one.name })));
  place.append(element("h2", { textContent: first ? "Settings" : "Settings of B" }), field(which, "checkpoint", select));
  if (first) {
    place.append(field("a", "classes", element("input", { value: "0" }), "class numbers with commas between, −1: without class"));
    place.append(field("a", "prompts", element("textarea", { rows: 3 }), "one a line"));
    place.append(field("a", "images", element("input", { type: "number", min: 1, max: 64, required: true, value: 1 }), "how many, the classes or prompts in turn"));
    place.append(field("a", "seed", element("input", { type: "number", min: 0, required: true, value: 1 }), "image i depends on (seed, i) only"));
  }
  const more = element("details", {}, element("summary", { textContent: "All settings" }));
  const named = (name) => content.settings.find((setting) => setting.name === name);
  const rest = content.settings.filter((setting) => !COMMON.includes(setting.name));
  const inputOf = (setting) => setting.choices
    ? element("select", {}, element("option", { value: "", textContent: "default" }), ...setting.choices.map((c) => element("option", { value: c, textContent: c })))
    : element("input", { value: "" });
  for (const name of COMMON) place.append(field(which, name, inputOf(named(name)), named(name).help));
  for (const setting of rest) more.append(field(which, setting.name, inputOf(setting), setting.help));
  if (first) {
    const draws = element("input", { type: "number", min: 0, max: 16, required: true, value: 0 });
    more.append(field("a", "sure", draws, "draws of each token besides, which show how sure a diffusion head is; they change no image"));
  }
  place.append(more);
  for (const name of ["checkpoint", "infer_mode", "solver"]) $(which + "-" + name).addEventListener("change", () => showDefaults(which));
  showDefaults(which);
}

// The settings that are used where the form names no others: the mode's, of a mode that the checkpoint can have.
const rulesOf = (which) => {
  const one = about($(which + "-checkpoint").value);
  return one.modes[$(which + "-infer_mode").value || one.settings.infer_mode] || one.settings;
};
const ofText = (which) => about($(which + "-checkpoint").value).text;
const promptsOf = () => $("a-prompts").value.split("\n").map((line) => line.trim()).filter((line, i, all) => line || all.length === 1);

function showDefaults(which) {
  const one = about($(which + "-checkpoint").value);
  if ($("b-checkpoint")) { // both forms are built
    const both = state.view === "compare" ? ["a", "b"] : ["a"];
    $("a-prompts").parentElement.hidden = !both.some(ofText);
    $("a-classes").parentElement.hidden = both.every(ofText);
  }
  for (const setting of content.settings) {
    const input = $(which + "-" + setting.name), used = setting.name === "infer_mode" ? one.settings : rulesOf(which);
    const value = setting.name === "spacing" ? one.spacings[$(which + "-solver").value || used.solver] : used[setting.name];
    const text = value === null || value === undefined ? "its own" : String(value);
    if (input.tagName === "SELECT") input.options[0].textContent = "default (" + text + ")";
    else input.placeholder = text;
  }
}

// Keep the room that a run of the form's settings will take, before there is one: pictures, maps and curves.
function reserveRoom() {
  if (state.runs.a) return;
  const one = about($("a-checkpoint").value), grid = one.layout[one.layout.length - 1], sure = one.discrete || Number($("a-sure").value) > 0;
  const learned = ($("a-order").value || rulesOf("a").order) === "learned";
  for (const [name] of MAPS) {
    mapCanvases[name].figure.hidden = !(["step", "tau", "cfg", "rank"].includes(name) || (name === "sure" ? sure : learned));
    mapCanvases[name].canvas.style.aspectRatio = grid.columns + " / " + grid.rows;
  }
  for (const canvas of [$("picture"), ...document.querySelectorAll(".three canvas, .pair canvas")]) canvas.style.aspectRatio = grid.columns + " / " + grid.rows;
  $("curves").replaceChildren(...CURVES.map(([, title, hasBase]) => plot(title + (hasBase ? HAND_MADE : ""), [])));
  $("compare-curves").replaceChildren(...CURVES.map(([, title]) => plot(title + " (A blue, B orange)", [])));
}

const wholeOrText = (text) => (/^\s*-?\d+\s*$/.test(text) && Number.isSafeInteger(Number(text)) ? Number(text) : text);

function readSettings(which) {
  const settings = {};
  for (const { name } of content.settings) {
    const text = $(which + "-" + name).value.trim();
    if (text) settings[name] = text;
  }
  return { checkpoint: $(which + "-checkpoint").value, settings };
}

// What is asked of the server for run A or B.
function specOf(which) {
  const prompts = promptsOf(), images = Number($("a-images").value) || 0;
  const classes = ofText(which) ? prompts.map((_, i) => i) : $("a-classes").value.split(",").map(wholeOrText);
  const labels = Array.from({ length: Math.min(Math.max(images, 0), 1000) }, (_, i) => classes[i % classes.length]);
  const spec = { ...readSettings(which), labels, seed: wholeOrText($("a-seed").value) };
  if (ofText(which)) spec.prompts = prompts;
  const sure = wholeOrText($("a-sure").value);
  if (sure) spec.sure = sure;
  if (which === "a") {
    if (state.steer.length) spec.steer = state.steer;
    if (state.redo.length) spec.redo = state.redo;
  }
  if (state.edit) spec.edit = state.edit;
  return spec;
}

// Take what is asked for into the form; the line that says what it cannot take.
function writeSpec(which, spec) {
  const settings = spec.settings || {}, labels = spec.labels || [0], prompts = spec.prompts || [];
  if (about(spec.checkpoint).name !== spec.checkpoint) return "this server has no checkpoint " + spec.checkpoint;
  $(which + "-checkpoint").value = spec.checkpoint;
  if (which === "a" || prompts.length) $("a-prompts").value = prompts.join("\n");
  const known = content.settings.map((setting) => setting.name);
  for (const name of known) $(which + "-" + name).value = settings[name] || "";
  showDefaults(which); // those of its mode and solver
  const lost = Object.keys(settings).find((name) => !known.includes(name) || $(which + "-" + name).value !== settings[name]);
  if (lost !== undefined) return "the address has a setting that this server does not know: " + lost + " " + settings[lost];
  if (which !== "a") return "";
  if (ofText("a") && labels.some((label, i) => label !== i % prompts.length)) return "the address has images that do not take the prompts in turn";
  const period = labels.findIndex((_, n) => n > 0 && labels.every((label, i) => label === labels[i % n]));
  if (!ofText("a")) $("a-classes").value = labels.slice(0, period > 0 ? period : labels.length).join(",");
  $("a-images").value = labels.length;
  $("a-seed").value = spec.seed === undefined ? 1 : spec.seed;
  $("a-sure").value = spec.sure || 0;
  state.steer = spec.steer || [];
  state.redo = spec.redo || [];
  state.edit = spec.edit || null;
  accepted = changesOf(state);
  return "";
}

// Show another run A or B, from its first step on: one that is cancelled before leaves the old one.
function replaceRun(which, run) {
  state.runs[which] = run;
  if (which !== "a") return;
  document.body.classList.remove("stored");
  state.image = Math.min(state.image, run.begin.labels.length - 1);
  state.token = state.hover = state.hoverStep = null;
  state.runs.b = null; // it had the seed and the labels of the A before
  for (const place of ["strip", "compare-strip"]) $(place).replaceChildren();
}

const changesOf = ({ steer, redo, edit }) => ({ steer, redo, edit });
let accepted = changesOf(state); // by the server, or by an address

// Run A or B; what comes is shown while it comes. Changes that the server refuses are taken back.
async function makeRun(which, signal, follow) {
  const spec = specOf(which), asked = changesOf(state);
  const [run, take] = collector((run) => {
    run.spec = spec;
    if (!run.begin) return;
    accepted = asked;
    if (run.steps.length && state.runs[which] !== run) replaceRun(which, run);
    const steps = run.begin.settings.num_iter || 1, done = run.steps.length;
    $("progress").value = run.end ? 1 : Math.min(0.99, done / steps);
    if (done) $("status").textContent = (which === "b" ? "B: " : "") + "step " + done + " of " + steps + ".";
    if (follow) follow(run);
  });
  await ask("run", spec, take, signal).catch((error) => {
    if (error.name !== "AbortError" && !run.begin) {
      Object.assign(state, accepted);
      showChanges();
      showSteerStep();
    }
    throw error;
  });
  if (!run.end) throw new Error("the server ended before the image was complete");
  return run;
}

// Generate A and show it; keep: the step of the loop to stay at.
function generateWatch(keep = null) {
  pause();
  if (keep !== null) state.wanted = keep;
  return busily("Asking the server.", async (signal) => {
    const run = await makeRun("a", signal, (run) => {
      if (!run.steps.length) return;
      if (keep === null && run.steps.length === 1 && !run.end) state.wanted = Infinity;
      drawStep();
    });
    $("status").textContent = "Complete: " + run.steps.length + " steps, " + number(run.steps.reduce((s, e) => s + e.seconds, 0)) + " s.";
    redraw();
    showShare();
  });
}

// Go to a step, an index; at the newest one the page follows a run that goes on.
function showStep(step) {
  const run = state.runs.a;
  if (!run || !run.steps.length) return;
  state.wanted = step < run.steps.length - 1 ? run.steps[Math.max(step, 0)].step : Infinity;
  drawStep();
}

// The index of the step that is wanted, or of the newest while that one has not come.
const indexWanted = (run) => Math.max(0, run.steps.findLastIndex((event) => event.step <= state.wanted));

function drawStep() {
  const run = state.runs.a;
  if (!run || !run.steps.length) return;
  const count = run.steps.length;
  state.step = indexWanted(run);
  const planned = live && run.begin.settings.num_iter && !run.end ? Math.max(count, run.begin.settings.num_iter) : count;
  $("scrubber").max = planned - 1;
  $("scrubber").value = state.step;
  const event = run.steps[state.step], row = seriesOf(run, state.image)[state.step];
  const parts = ["step " + (state.step + 1) + " of " + planned];
  if (row.group !== null) parts.push(row.group + " tokens, τ " + number(row.tau, 4) + ", w " + number(row.cfg, 4));
  else parts.push("nothing left to draw");
  if (event.seconds !== undefined) parts.push(number(event.seconds) + " s; " + number(event.mar) + " backbone and " + number(event.mlp) + " token head evaluations so far");
  if (run.begin.layout.length > 1 && row.group) parts.push("scale " + shapeOf(gridDrawn(run, state.step)));
  $("readout").textContent = parts.join(" · ");
  $("scrubber").setAttribute("aria-valuetext", parts.slice(0, 2).join(", "));
  drawPicture();
  drawMaps();
  drawCurves();
  showToken();
  showSteerStep();
}

// The images of a batch, to choose which one is shown.
const showStrip = () => drawStrip("strip");

function drawStrip(place) {
  const run = state.runs.a, count = run && run.end ? run.begin.labels.length : 0;
  if (count < 2) return $(place).replaceChildren();
  const sheet = sheetOf(run, run.steps.length - 1);
  const buttons = run.begin.labels.map((label, i) => {
    const canvas = element("canvas");
    drawSheet(canvas, sheet, i, count, 44);
    const button = element("button", { type: "button", "aria-pressed": String(i === state.image), "aria-label": "Image " + (i + 1) + ", of " + run.begin.names[i] }, canvas);
    button.addEventListener("click", () => {
      state.image = i;
      redraw();
      $(place).children[i].focus(); // the button is another one now
    });
    return button;
  });
  $(place).replaceChildren(...buttons);
}

let player = null;
function pause() {
  clearInterval(player);
  player = null;
  $("play").textContent = "▶ play";
  $("play").setAttribute("aria-label", "Play");
}
function playOrPause() {
  const run = state.runs.a;
  if (player) return pause();
  if (!run || !run.steps.length) return;
  if (state.step >= run.steps.length - 1) showStep(0);
  $("play").textContent = "❚❚ pause";
  $("play").setAttribute("aria-label", "Pause");
  player = setInterval(() => {
    if (state.step >= state.runs.a.steps.length - 1) return pause();
    showStep(state.step + 1);
  }, Math.max(80, Math.min(500, 8000 / run.steps.length)));
}

function go(step) {
  pause();
  showStep(step);
}

function wireWatch() {
  $("first").addEventListener("click", () => go(0));
  $("back").addEventListener("click", () => go(state.step - 1));
  $("forth").addEventListener("click", () => go(state.step + 1));
  $("last").addEventListener("click", () => go(Infinity));
  $("play").addEventListener("click", playOrPause);
  $("scrubber").addEventListener("input", () => go(Number($("scrubber").value)));
  $("outline").addEventListener("change", drawPicture);
  document.addEventListener("keydown", (event) => {
    const own = event.key === " " ? "input:not([type=range]), select, textarea, button, summary" : "input, select, textarea, [role=tab]";
    if (event.defaultPrevented || state.view !== "watch" || event.target.closest(own)) return; // they use the key themselves
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: Infinity };
    if (event.key in steps) go(steps[event.key]);
    else if (event.key === " ") playOrPause();
    else return;
    event.preventDefault();
  });
}
