// Two rules, or two checkpoints, side by side: the same seeds, and if wanted the same evaluations.

const figuresOf = new Map(); // request, as JSON -> the figures that were measured of it
const requestOf = (name) => state.runs[name] && JSON.stringify(state.runs[name].spec);
const measuredOf = (name) => figuresOf.get(requestOf(name)) || null;

function generateCompare() {
  return busily("Asking the server.", async (signal) => {
    state.compareStep = Infinity;
    const follow = () => (state.view === "compare" ? showCompare(Infinity) : redraw());
    await makeRun("a", signal, follow);
    await makeRun("b", signal, follow);
    $("status").textContent = "Both are complete.";
    state.step = state.runs.a.steps.length - 1;
    redraw();
    showShare();
  });
}

function pixels(canvas) {
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
}

// |A − B| of what the two canvases show, four times as bright; the mean difference in grey levels.
function drawDifference() {
  const a = $("compare-a"), b = $("compare-b"), canvas = $("compare-difference");
  if (a.width !== b.width || a.height !== b.height) {
    $("compare-difference-text").textContent = "the two have pictures of different sizes";
    return;
  }
  const one = pixels(a), two = pixels(b);
  let sum = 0;
  for (let i = 0; i < one.data.length; i++) {
    if (i % 4 === 3) continue;
    const difference = Math.abs(one.data[i] - two.data[i]);
    sum += difference;
    one.data[i] = Math.min(255, 4 * difference);
  }
  resize(canvas, a.width, a.height);
  canvas.getContext("2d").putImageData(one, 0, 0);
  $("compare-difference-text").textContent = "difference, four times as bright; mean " + number(sum / (one.data.length * 0.75)) + " grey levels";
}

function clearPicture(id, text) {
  $(id).getContext("2d").clearRect(0, 0, $(id).width, $(id).height);
  $(id + "-text").textContent = text;
}

function showCompare(step) {
  const { a, b } = state.runs, longest = Math.max(a ? a.steps.length : 0, b ? b.steps.length : 0, 1);
  const shown = Math.min(step, longest - 1);
  state.compareStep = shown < longest - 1 ? shown : Infinity; // the last one stays the last, of longer runs too
  $("compare-scrubber").max = longest - 1;
  $("compare-scrubber").value = shown;
  for (const [name, run] of [["a", a], ["b", b]]) {
    if (!run || !run.steps.length) {
      clearPicture("compare-" + name, name.toUpperCase());
      continue;
    }
    const own = Math.min(shown, run.steps.length - 1), sheet = sheetOf(run, own);
    if (sheet) drawSheet($("compare-" + name), sheet, state.image, run.begin.labels.length);
    const evals = run.end ? "; " + number(run.end.evals.mar, 5) + " backbone, " + number(run.end.evals.mlp, 6) + " token head evaluations" : "";
    $("compare-" + name + "-text").textContent = name.toUpperCase() + ", step " + (own + 1) + " of " + run.steps.length + evals;
  }
  if (a && b && a.steps.length && b.steps.length) drawDifference();
  else clearPicture("compare-difference", "difference");
  const both = [["a", "line"], ["b", "line second"]].filter(([name]) => state.runs[name] && state.runs[name].steps.length);
  const series = both.map(([name, style]) => [seriesOf(state.runs[name], state.image), style]);
  const figures = CURVES.map(([name, title]) => plot(title + (series.length > 1 ? " (A blue, B orange)" : ""), series.map(([rows, style]) => ({ values: rows.map((row) => row[name]), style })), { now: shown, onStep: showCompare }));
  $("compare-curves").replaceChildren(...figures);
  drawStrip("compare-strip");
  showTable();
}

function showTable() {
  const { a, b } = state.runs, rows = [];
  const row = (name, value) => rows.push([name, value("a"), value("b")]);
  const ended = (name) => state.runs[name] && state.runs[name].end;
  row("checkpoint", (name) => (state.runs[name] && state.runs[name].begin ? state.runs[name].begin.name : "–"));
  row("autoregressive steps", (name) => (state.runs[name] ? state.runs[name].steps.length : "–"));
  row("backbone evaluations", (name) => (ended(name) ? number(ended(name).evals.mar, 5) : "–"));
  row("token head evaluations", (name) => (ended(name) ? number(ended(name).evals.mlp, 6) : "–"));
  row("seconds", (name) => (state.runs[name] ? number(state.runs[name].steps.reduce((s, e) => s + e.seconds, 0)) : "–"));
  const measured = { a: measuredOf("a"), b: measuredOf("b") };
  if (measured.a || measured.b) row("images measured", (name) => (measured[name] ? measured[name].num_images : "–"));
  const figures = new Set([...Object.keys((measured.a || {}).metrics || {}), ...Object.keys((measured.b || {}).metrics || {})]);
  for (const figure of figures) row(figure.replaceAll("_", " "), (name) => (measured[name] ? number(measured[name].metrics[figure], 4) : "–"));
  const line = (cells, tag) => element("tr", {}, ...cells.map((text, i) => element(i ? tag : "th", { textContent: text, scope: i ? "col" : "row" })));
  $("compare-table").replaceChildren(line(["", "A", "B"], "th"), ...rows.map((cells) => line(cells, "td")));
}

// Whether B has the evaluations of A, or how near it comes.
function showGap(most) {
  const [a, b] = ["a", "b"].map((name) => state.runs[name].end.evals);
  const gaps = [["mar", "backbone"], ["mlp", "token head"]].filter(([name]) => a[name] !== b[name]);
  const lines = gaps.map(([name, title]) => number(b[name], 6) + " " + title + " evaluations, A " + number(a[name], 6));
  $("status").textContent = lines.length ? "Not equal: B took " + lines.join(", and ") + "; no other number of steps up to " + most + " is nearer." : "B took the evaluations of A.";
}

function equalise() {
  const { a } = state.runs;
  if (!a || !a.end) return showError("generate first: B is given the evaluations that A took");
  let steps = 0;
  return busily("Searching for steps with the evaluations of A.", async (signal) => {
    await ask("match", { spec: specOf("b"), target: a.end.evals }, (event) => {
      if (event.matched) steps = event.most;
      if (event.tried) $("status").textContent = "Tried " + Object.entries(event.tried).map(([name, value]) => name + " " + value).join(", ") + ".";
      if (event.matched) for (const [name, value] of Object.entries(event.matched)) $("b-" + name).value = value;
    }, signal);
  }).then((done) => done && generateCompare()).then((done) => done && showGap(steps));
}

let measuring = null;
async function measureBoth() {
  if (measuring) return;
  if (!state.runs.a || !state.runs.b) return showError("generate A and B first: what is measured are the settings that are shown");
  measuring = new AbortController();
  showError("");
  $("measure").disabled = true;
  $("measure-cancel").disabled = false;
  const num_images = wholeOrText($("measure-count").value), requests = { a: requestOf("a"), b: requestOf("b") };
  let kind = "";
  try {
    for (const name of ["a", "b"]) {
      await ask("measure", { spec: JSON.parse(requests[name]), num_images }, (event) => {
        if (event.of) $("status").textContent = name.toUpperCase() + ": " + event.made + " of " + event.of + " images to measure.";
        if (!event.measured) return;
        figuresOf.set(requests[name], { ...event.measured, num_images });
        kind = (event.measured.protocol || {}).kind || "as sample.py does";
      }, measuring.signal);
      showTable();
    }
    const other = ["a", "b"].some((name) => requestOf(name) !== requests[name]);
    $("status").textContent = "Measured: " + kind + (other ? "; what is shown by now are other settings: the figures stand beside those measured, where they are generated again." : ".");
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent = "Measuring was cancelled.";
    else {
      showError(error.message);
      $("status").textContent = FAILED;
    }
  } finally {
    measuring = null;
    $("measure").disabled = false;
    $("measure-cancel").disabled = true;
  }
}

function wireCompare() {
  $("equal").addEventListener("click", equalise);
  $("measure").addEventListener("click", measureBoth);
  $("measure-cancel").addEventListener("click", () => measuring && measuring.abort());
  $("compare-scrubber").addEventListener("input", () => showCompare(Number($("compare-scrubber").value)));
}
