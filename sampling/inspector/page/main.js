// The start of the page: its parts, and what its address or its content says to show.

// Draw the view that is shown: all of them show the run A, and the others were hidden while it was made.
function redraw() {
  if (state.view === "watch") {
    drawStep();
    showStrip();
  } else if (state.view === "compare") showCompare(state.compareStep);
  else showBatch();
}

function showView(view) {
  state.view = view;
  for (const name of ["watch", "compare", "batch"]) {
    $(name).hidden = name !== view;
    $("tab-" + name).setAttribute("aria-selected", String(name === view));
  }
  $("form-b").hidden = view !== "compare";
  if (live) showDefaults("a"); // whether there are prompts depends on which checkpoints are shown
  redraw();
}

// The line that says which number of the form cannot be, having shown its field; "" where all can.
function wrongField() {
  const wrong = $("form").querySelector("input:invalid");
  if (!wrong) return "";
  if (wrong.closest("details")) wrong.closest("details").open = true;
  wrong.focus();
  const range = wrong.max ? "from " + wrong.min + " to " + wrong.max : "of at least " + wrong.min;
  return wrong.labels[0].textContent + " must be a whole number " + range + ", got " + (wrong.value || "none");
}

function generate(step) {
  pause();
  const line = wrongField();
  if (line) return showError(line);
  return state.view === "compare" ? generateCompare() : generateWatch(Number.isInteger(step) ? step : null);
}

function start() {
  buildMaps();
  wireWatch();
  wirePicture();
  wireBatch();
  wireCurves();
  const tabs = ["watch", "compare", "batch"];
  tabs.forEach((name, i) => {
    $("tab-" + name).addEventListener("click", () => showView(name));
    $("tab-" + name).addEventListener("keydown", (event) => {
      const other = { ArrowLeft: tabs[i - 1], ArrowRight: tabs[i + 1] }[event.key];
      if (!other || !$("tab-" + other).offsetParent) return;
      $("tab-" + other).focus();
      showView(other);
    });
  });
  if (live) {
    buildForm("a");
    buildForm("b");
    wireSteer();
    wireBranch();
    wireCompare();
    wireShare();
    $("form").addEventListener("submit", (event) => {
      event.preventDefault();
      generate();
    });
    $("cancel").addEventListener("click", () => state.busy && state.busy.abort());
    const said = readAddress();
    reserveRoom();
    for (const name of ["checkpoint", "infer_mode", "order", "sure"]) $("a-" + name).addEventListener("change", reserveRoom);
    window.addEventListener("hashchange", () => location.reload()); // the page of another address
    if (said) return Promise.resolve(generate(said.step)).then((made) => made && checkHashes(said.hash));
  } else document.body.classList.add("static");
  if (content.events) return showStored();
}

// What a stored run was made of, in words: a page of its own has no form.
function showAbout(begin) {
  const settings = Object.entries(begin.settings).filter(([, value]) => value !== null && value !== "");
  const kind = begin.text ? "prompts" : "classes";
  const rows = [
    ["checkpoint", begin.name + (begin.family ? ", " + begin.family : "")], [kind, begin.names.join(", ")], ["seed", begin.seed],
    ["settings", settings.map(([name, value]) => name + " " + value).join(", ")], ["command", begin.command],
  ].filter(([, value]) => value !== null && value !== "");
  $("about-list").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
  $("about").hidden = false;
  document.title = "Inspector: " + rows.slice(0, 3).map(([name, value]) => name + " " + value).join("; ");
}

async function showStored() {
  const [run, take] = collector(() => {});
  for (const event of content.events) await take(event);
  if (!live) showAbout(run.begin);
  state.runs.a = run;
  document.body.classList.add("stored"); // it has no request that could be changed, branched or shared
  showStep(run.steps.length - 1);
  showStrip();
  document.body.dataset.done = "1";
}

start();
