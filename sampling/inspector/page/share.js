// The address that holds all settings, the command that makes the same images, and files.

function shared() {
  const what = { view: state.view, a: specOf("a"), step: state.step, image: state.image };
  if (state.view === "compare") what.b = specOf("b");
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
    const answer = await post("export", { spec: specOf("a"), format });
    const link = element("a", { href: URL.createObjectURL(await answer.blob()), download: "inspector." + format });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    $("status").textContent = "Exported inspector." + format + ".";
  } catch (error) {
    showError(error.message);
  }
}

// What an address says, taken into the form; false where it says nothing.
function readAddress() {
  if (location.hash.length < 2) return false;
  let what;
  try {
    what = JSON.parse(decodeURIComponent(location.hash.slice(1)));
  } catch {
    showError("the address does not say what to show: it was cut short");
    return false;
  }
  if (!what || typeof what.a !== "object" || what.a === null) return false;
  writeSpec("a", what.a);
  writeSpec("b", what.b || what.a);
  state.image = Number.isInteger(what.image) ? what.image : 0;
  showView(["watch", "compare", "batch"].includes(what.view) ? what.view : "watch");
  showChanges();
  return true;
}

function wireShare() {
  $("copy-address").addEventListener("click", () => copy("address"));
  $("copy-command").addEventListener("click", () => copy("command"));
  for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => exportAs(button.dataset.export));
}
