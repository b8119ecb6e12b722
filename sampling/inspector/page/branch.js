// Branches: when is the image decided?

const spreads = new Map(); // step -> mean spread of the branches from there, of this run and image
let spreadsOf = [];

function branchFrom(steps) {
  const run = state.runs.a;
  if (!run || !run.end) return showError("generate an image first");
  const count = wholeOrText($("branch-count").value), { redo, ...spec } = run.spec;
  if (spreadsOf[0] !== run || spreadsOf[1] !== state.image) spreads.clear();
  spreadsOf = [run, state.image];
  return busily("Branching.", async (signal) => {
    let made = 0;
    await ask("branch", { spec, image: state.image, steps, count }, async (event) => {
      if (event.branched === undefined) return;
      made += 1;
      $("progress").value = made / steps.length;
      $("status").textContent = "Branched at step " + (event.branched + 1) + ".";
      spreads.set(event.branched, event.value);
      await showBranches(event, count);
    }, signal);
    $("progress").value = 1;
  });
}

async function showBranches(event, count) {
  for (const name of ["mean", "spread"]) drawSheet($("branch-" + name), { image: await loadImage(event[name]), columns: 1 }, 0, 1);
  const sheet = { image: await loadImage(event.images.url), columns: event.images.columns };
  const canvases = Array.from({ length: count }, (_, i) => {
    const canvas = element("canvas", { role: "img", "aria-label": "Branch " + (i + 1) });
    drawSheet(canvas, sheet, i, count, 44);
    return canvas;
  });
  $("branch-images").replaceChildren(...canvases);
  const last = Math.max(...spreads.keys()), values = Array.from({ length: last + 1 }, (_, step) => (spreads.has(step) ? spreads.get(step) : null));
  $("branch-curve").replaceChildren(plot("spread of branches from a step (grey levels)", [{ values, style: "line" }], { now: event.branched, onStep: showStep }));
}

function wireBranch() {
  $("branch").addEventListener("click", () => branchFrom([stepWanted()]));
  $("branch-all").addEventListener("click", () => {
    const run = state.runs.a;
    spreads.clear();
    branchFrom(run && run.begin ? Array.from({ length: run.begin.settings.num_iter }, (_, step) => step) : [0]);
  });
}
