// Many images by steps; and whether the rules are adaptive, or a schedule.

const LABELS = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"];
const LONGEST = 150; // pixels of a name beside the strip

const classesOf = (run) => [...new Set(run.begin.labels)].sort((a, b) => a - b);

// The colour of a class among those of a run: hues a golden angle apart once the named ones are used up.
function classColour(run, label) {
  const place = classesOf(run).indexOf(label);
  return LABELS[place] || "hsl(" + Math.round(place * 137.5) % 360 + " 65% " + (40 + (place % 3) * 12) + "%)";
}

// Mean group size, τ and w of the images of each class, over all steps.
function drawClasses(run) {
  const line = (cells, tag) => element("tr", {}, ...cells.map((cell, i) => (i ? element(tag, { textContent: cell, scope: tag === "th" ? "col" : "" }) : element("th", { scope: tag === "th" ? "col" : "row" }, ...cell))));
  const rows = classesOf(run).map((label) => {
    const images = run.begin.labels.flatMap((other, i) => (other === label ? [i] : []));
    const items = run.steps.flatMap((event) => event.images.filter((item) => images.includes(item.image) && item.positions.length));
    const means = ["group", "tau", "cfg"].map((name) => number(mean(items.map((item) => mean(valuesOf(item, name)))), 4));
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = classColour(run, label);
    return line([[swatch, run.begin.names[images[0]]], images.length, ...means], "td");
  });
  $("batch-classes").replaceChildren(line([["class"], "images", "tokens a step", "τ", "w"], "th"), ...rows);
}

function showBatch() {
  const run = state.runs.a;
  if (!run || !run.end) return;
  drawStripOf(run);
  drawClasses(run);
  const shares = [["group", "tokens a step"], ["tau", "τ"], ["cfg", "w"]].map(([name, title]) => ({ name, title, ...variance(run, name) }));
  $("batch-curves").replaceChildren(...shares.map(({ name, title }) => spreadPlot(run, name, title)));
  const line = (cells, tag) => element("tr", {}, ...cells.map((text, i) => element(i ? tag : "th", { textContent: text })));
  const percent = (share) => Math.round(100 * share) + " %";
  const rows = shares.map((s) => line([s.title, number(s.total), ...(s.total ? [s.steps, s.images, s.tokens].map(percent) : ["–", "–", "–"])], "td"));
  $("batch-table").replaceChildren(line(["", "variance", "between steps", "between images", "between tokens"], "th"), ...rows);
  const most = shares.filter((s) => s.total > 0 && run.begin.labels.length > 1);
  const adaptive = most.filter((s) => s.images + s.tokens > 0.1).map((s) => s.title);
  const verdict = !most.length ? "The values do not vary, or there is one image only." : adaptive.length
    ? "Adaptive: " + adaptive.join(", ") + " differ between images or tokens by more than a tenth of their variance."
    : "A schedule: more than nine tenths of the variance lie between steps.";
  $("batch-verdict").textContent = verdict;
}

function drawStripOf(run) {
  const count = run.begin.labels.length, side = Math.max(16, Math.min(48, Math.floor(1400 / run.steps.length))), canvas = $("batch-strip");
  const context = canvas.getContext("2d"), ink = getComputedStyle(document.body).color, font = "11px system-ui, sans-serif";
  context.font = font;
  const names = 20 + Math.min(LONGEST, Math.ceil(Math.max(...run.begin.names.map((name) => context.measureText(name).width))));
  canvas.width = names + run.steps.length * (side + 1);
  canvas.height = 16 + count * (side + 1);
  context.imageSmoothingEnabled = false;
  context.fillStyle = ink;
  context.font = font; // a new size wipes it
  run.steps.forEach((event, step) => {
    const sheet = sheetOf(run, step), x = names + step * (side + 1);
    context.fillText(step + 1, x + 2, 11);
    if (!sheet) return;
    const { width, height } = sizeOf(sheet, count), scale = side / Math.max(width, height);
    for (let i = 0; i < count; i++) {
      const from = [(i % sheet.columns) * width, Math.floor(i / sheet.columns) * height, width, height];
      context.drawImage(sheet.image, ...from, x, 16 + i * (side + 1), width * scale, height * scale);
    }
  });
  run.begin.names.forEach((name, i) => {
    const y = 16 + i * (side + 1) + side / 2;
    context.fillStyle = classColour(run, run.begin.labels[i]);
    context.fillRect(0, y - 4, 8, 8);
    context.fillStyle = ink;
    context.fillText(shortened(context, name), 12, y + 4);
  });
  canvas.setAttribute("aria-label", count + " images by " + run.steps.length + " steps");
}

// As much of a name as there is room for.
function shortened(context, name) {
  const isFit = (text) => context.measureText(text).width <= LONGEST;
  if (isFit(name)) return name;
  let count = name.length;
  while (count && !isFit(name.slice(0, count) + "…")) count -= 1;
  return name.slice(0, count) + "…";
}

// The values that an image draws in a step: its tokens' τ or w, or its group size.
const valuesOf = (item, name) => (name === "group" ? [item.positions.length] : item[name]);

// Total variance, and the shares of it between steps, between the images of a step and between the tokens of an image.
function variance(run, name) {
  const steps = run.steps.map((event) => event.images.filter((item) => item.positions.length).map((item) => {
    const values = valuesOf(item, name), centre = mean(values);
    return [centre, mean(values.map((value) => (value - centre) ** 2))];
  })).filter((images) => images.length);
  const centres = steps.map((images) => mean(images.map(([centre]) => centre))), whole = mean(centres);
  const parts = {
    steps: mean(centres.map((centre) => (centre - whole) ** 2)),
    images: mean(steps.map((images, i) => mean(images.map(([centre]) => (centre - centres[i]) ** 2)))),
    tokens: mean(steps.map((images) => mean(images.map(([, spread]) => spread)))),
  };
  const total = parts.steps + parts.images + parts.tokens;
  if (!(total > 1e-10)) return { total: 0, steps: 0, images: 0, tokens: 0 };
  return { total, steps: parts.steps / total, images: parts.images / total, tokens: parts.tokens / total };
}

function spreadPlot(run, name, title) {
  const dots = [], centres = run.steps.map((event) => {
    const values = event.images.filter((item) => item.positions.length).map((item) => [item, mean(valuesOf(item, name))]);
    for (const [item, value] of values) {
      dots.push([run.steps.indexOf(event), value, classColour(run, run.begin.labels[item.image]), "image " + (item.image + 1) + ", class " + run.begin.names[item.image] + ": " + number(value, 4)]);
    }
    return mean(values.map(([, value]) => value));
  });
  return plot(title + " by step; a dot an image, a colour a class", [{ values: centres, style: "line" }], { dots });
}

// What shows whether rules are adaptive: images of several classes.
function fillBatch() {
  $("a-images").value = 20;
  if (!ofText("a")) $("a-classes").value = about($("a-checkpoint").value).classes.map((_, i) => i).slice(0, 10).join(",");
  return generate();
}

function wireBatch() {
  if (live) $("batch-fill").addEventListener("click", fillBatch);
  // ink and axes have the colours of the scheme
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.view === "batch" && showBatch());
}
