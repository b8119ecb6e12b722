// The start of the page: its parts, and what its address or its content says to show.

function showView(view) {
  state.view = view;
  for (const name of ["watch", "compare", "batch"]) {
    $(name).hidden = name !== view;
    $("tab-" + name).setAttribute("aria-selected", String(name === view));
  }
  $("form-b").hidden = view !== "compare";
  if (view === "batch") {
    if (live && Number($("a-images").value) < 2 && !location.hash.includes("batch")) {
      $("a-images").value = 20;
      $("a-classes").value = about($("a-checkpoint").value).classes.map((_, i) => i).slice(0, 10).join(",");
    }
    showBatch();
  }
}

function generate() {
  pause();
  return state.view === "compare" ? generateCompare() : generateWatch();
}

function start() {
  buildMaps();
  wireWatch();
  wirePicture();
  for (const name of ["watch", "compare", "batch"]) $("tab-" + name).addEventListener("click", () => showView(name));
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
    if (readAddress()) return generate();
  } else document.body.classList.add("static");
  if (content.events) return showStored();
}

async function showStored() {
  const [run, take] = collector(() => {});
  for (const event of content.events) await take(event);
  state.runs.a = run;
  showStep(run.steps.length - 1);
  showStrip();
  document.body.dataset.done = "1";
}

start();
