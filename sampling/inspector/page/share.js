// The address that holds all settings, the command that makes the same images, and files.

// The hashes of the images that the runs shown have made, by run.
function hashesShown() {
  const runs = ["a", "b"].map((name) => [name, state.runs[name]]).filter(([, run]) => run && run.end && run.end.hash); // a stored trace has none
  return Object.fromEntries(runs.map(([name, run]) => [name, run.end.hash]));
}

// Say where an address was made with other images than those that it has made now, as its checkpoints have names only.
function checkHashes(expected) {
  if (!isObject(expected)) return;
  const made = hashesShown(), other = Object.keys(made).find((name) => Object.hasOwn(expected, name) && expected[name] !== made[name]);
  if (other === undefined) return;
  showError("this is not the image that was shared: " + other.toUpperCase() + " has hash " + made[other] + ", the address " + String(expected[other]).slice(0, 20) + "; the checkpoint " + state.runs[other].spec.checkpoint + " or the machine is another one");
}

function shared() {
  const what = { view: state.view, a: specShown("a"), step: stepOfLoop(), image: state.image };
  if (state.view === "compare") what.b = specShown("b");
  what.hash = hashesShown();
  return what;
}

function showShare() {
  if (!live) return;
  const address = location.pathname + location.search + "#" + encodeURIComponent(JSON.stringify(shared()));
  history.replaceState(null, "", address);
  // without the token, which opens this server to whoever has it
  $("address").value = location.origin + location.pathname + "#" + encodeURIComponent(JSON.stringify(shared()));
  const run = state.runs.a;
  if (!run || !run.begin) return;
  $("command").value = run.begin.command || "";
  const steered = state.steer.length || state.redo.length;
  $("command-note").textContent = steered ? "The command makes the images without what was steered: sample.py has no flags for that."
    : !run.begin.command ? "sample.py takes prompts in turn, and has no command for these images."
    : run.begin.text && run.begin.classes.length > 1 ? "prompts.txt has the prompts, one a line."
    : state.edit ? "image.png is the uploaded picture, mask.png is white where cells were painted." : "The command makes exactly these images.";
  $("hash").textContent = (run.end && run.end.hash) || "–";
}

async function copy(id) {
  const place = $(id);
  place.select();
  try {
    await navigator.clipboard.writeText(place.value);
    $("status").textContent = "Copied.";
  } catch {
    document.execCommand("copy");
    $("status").textContent = "Selected: copy it with the keyboard.";
  }
}

async function exportAs(format) {
  showError("");
  try {
    const answer = await post("export", { spec: specShown("a"), format });
    const link = element("a", { href: URL.createObjectURL(await answer.blob()), download: "inspector." + format });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    $("status").textContent = "Exported inspector." + format + ".";
  } catch (error) {
    showError(error.message);
    $("status").textContent = FAILED;
  }
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const listOf = (isRight, least = 1) => (value) => Array.isArray(value) && value.length >= least && value.every(isRight);
const hasRegion = (value) => isObject(value) && Array.isArray(value.region);
const WHAT = { // the shape of what an address asks for; the values are the server's to judge
  checkpoint: (value) => typeof value === "string", settings: isObject, prompts: listOf((value) => typeof value === "string"), labels: listOf(Number.isInteger),
  seed: Number.isInteger, steer: listOf(isObject, 0), redo: listOf(hasRegion, 0), sure: Number.isInteger, edit: hasRegion,
};

// The name of the part of a request that cannot be; undefined where all can.
function wrongPart(spec) {
  if (!isObject(spec) || !("checkpoint" in spec)) return "checkpoint";
  return Object.keys(spec).find((name) => !Object.hasOwn(WHAT, name) || !WHAT[name](spec[name]));
}

// What an address says, taken into the form; null where it says nothing, or what cannot be, which is an error.
function readAddress() {
  if (location.hash.length < 2) return null;
  let what, line;
  try {
    what = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    what = isObject(what) ? what : {};
    const wrong = wrongPart(what.a) || wrongPart(what.b || what.a);
    line = wrong ? "the address does not say what to show: its " + wrong + " cannot be" : writeSpec("a", what.a) || writeSpec("b", what.b || what.a);
  } catch {
    line = "the address does not say what to show: it was cut short";
  }
  if (line) {
    showError(line);
    return null;
  }
  state.image = Math.min(Math.max(Number.isInteger(what.image) ? what.image : 0, 0), Number($("a-images").value) - 1);
  showView(["watch", "compare", "batch"].includes(what.view) ? what.view : "watch");
  fillClasses();
  showChanges();
  return what;
}

function wireShare() {
  $("copy-address").addEventListener("click", () => {
    showShare(); // of the step and image that are shown now
    copy("address");
  });
  $("copy-command").addEventListener("click", () => copy("command"));
  for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => exportAs(button.dataset.export));
}
