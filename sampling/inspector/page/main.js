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
  if (view === "batch") {
    if (live && Number($("a-images").value) < 2 && !location.hash.includes("batch")) {
      $("a-images").value = 20;
      if (!ofText("a")) $("a-classes").value = about($("a-checkpoint").value).classes.map((_, i) => i).slice(0, 10).join(",");
    }
  }
  redraw();
}

function generate(step) {
  pause();
  return state.view === "compare" ? generateCompare() : generateWatch(Number.isInteger(step) ? step : null);
}

function start() {
  buildMaps();
  wireWatch();
  wirePicture();
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
    if (said) return generate(said.step);
  } else document.body.classList.add("static");
  if (content.events) return showStored();
}

async function showStored() {
  const [run, take] = collector(() => {});
  for (const event of content.events) await take(event);
  state.runs.a = run;
  document.body.classList.add("stored"); // it has no request that could be changed, branched or shared
  showStep(run.steps.length - 1);
  showStrip();
  document.body.dataset.done = "1";
}

start();
