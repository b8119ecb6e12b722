"use strict";
// What all parts share: what the page knows, elements, questions to the server, and runs.

const content = JSON.parse(document.getElementById("content").textContent);
const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const live = Array.isArray(content.checkpoints) && content.checkpoints.length > 0; // else a stored run is all there is
const MOST_UPLOAD = 5 * 2 ** 20; // bytes of a picture, which base64 makes a third longer

// The run of view A and, when two are compared, of B: {begin, steps, end}; what is steered; where one looks. step: the
// one shown, an index of the run's steps; wanted: the one of the loop to stay at, Infinity the newest.
const state = {
  view: "watch", runs: { a: null, b: null }, step: 0, wanted: Infinity, compareStep: Infinity, image: 0, token: null, hover: null, hoverStep: null,
  steer: [], redo: [], edit: null, painted: new Set(), upload: null, busy: null,
};

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function showError(line) {
  $("error").textContent = line ? String(line).split("\n")[0] : "";
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

async function post(name, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers["X-Token"] = token;
  let answer;
  try {
    answer = await fetch("/api/" + name, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is it still running?");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error || "the server answered " + answer.status);
  }
  return answer;
}

// Ask, and call onEvent with every line of the answer as it comes.
async function ask(name, body, onEvent, signal) {
  const reader = (await post(name, body, signal)).body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    text += decoder.decode(value || new Uint8Array(), { stream: !done });
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw new Error(event.error);
      await onEvent(event);
    }
    if (done) return;
  }
}

const FAILED = "It was not done: the line at the top says why.";

// One thing at a time in this page: what is begun ends what went on before.
async function busily(what, work) {
  if (state.busy) state.busy.abort();
  const control = new AbortController();
  state.busy = control;
  showError("");
  $("cancel").disabled = false;
  $("status").textContent = what;
  try {
    await work(control.signal);
    return state.busy === control;
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
    if (state.busy === control) $("status").textContent = error.name === "AbortError" ? "Cancelled." : FAILED;
    return false;
  } finally {
    if (state.busy === control) {
      state.busy = null;
      $("cancel").disabled = true;
      document.body.dataset.done = String(Number(document.body.dataset.done || 0) + 1);
    }
  }
}

// What the run that is shown was asked for, whatever the form says by now.
const specShown = (which) => (state.runs[which] && state.runs[which].spec) || specOf(which);

function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("a picture cannot be read"));
    image.src = url;
  });
}

// Take the events of a run in; call onStep(run) at each.
function collector(onStep) {
  const run = { begin: null, steps: [], end: null };
  return [run, async (event) => {
    if (event.waiting) $("status").textContent = "Waiting: " + event.waiting + " in the queue.";
    if (event.begin) run.begin = event.begin;
    if (event.images && event.step !== undefined) {
      const before = run.steps[run.steps.length - 1];
      const sheet = event.frame && { image: await loadImage(event.frame.url), columns: event.frame.columns };
      run.steps.push({ ...event, sheet: sheet || (before && before.sheet) || null });
    }
    if (event.end) {
      const sheet = event.end.images;
      run.end = { ...event.end, sheet: { image: await loadImage(sheet.url), columns: sheet.columns } };
    }
    await onStep(run);
  }];
}

// The sheet to show after a step: the finished pictures after the last.
function sheetOf(run, step) {
  if (run.end && step >= run.steps.length - 1) return run.end.sheet;
  return run.steps[step] && run.steps[step].sheet;
}

// Of an image, for each position: {step, index in steps, and the values it was drawn with}; later stages win.
function tokensOf(run, image) {
  const tokens = new Map();
  run.steps.forEach((event, index) => {
    const item = event.images.find((part) => part.image === image);
    if (!item) return;
    item.positions.forEach((position, i) => {
      const values = { step: event.step, index };
      for (const name of ["tau", "cfg", "rank", "sure", "logit"]) values[name] = item[name] ? item[name][i] : null;
      tokens.set(position, values);
    });
  });
  return tokens;
}

function lengthOf(run) {
  return run.begin.layout.reduce((sum, grid) => sum + grid.rows * grid.columns, 0);
}
