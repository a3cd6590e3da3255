// The service's page: choose a picture, send it, follow the job, compare the result.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["steps", "seed", "num_images", "guidance_scale", "width", "height", "true_cfg_scale"];
const ENDED = ["done", "failed", "cancelled"];

let about = null;
let picture = null; // {blob, url, shape}: what is to be edited
let asked = null; // the picture of the edit that runs
let before = null; // the picture that the result is compared with
let job = null;
let stopSending = null; // ends the wait for an answer to what is being sent

async function start() {
  $("key").value = sessionStorage.getItem("key") ?? "";
  wire();
  await ask();
}

function wire() {
  const drop = $("drop");
  drop.addEventListener("click", () => $("file").click());
  drop.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      $("file").click();
    }
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
    });
  }
  drop.addEventListener("drop", (event) => choose(event.dataTransfer.files[0]));
  $("file").addEventListener("change", () => choose($("file").files[0]));
  document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    edit();
  });
  $("key").addEventListener("change", () => {
    sessionStorage.setItem("key", $("key").value);
    ask();
  });
  $("cancel").addEventListener("click", cancel);
  $("slider").addEventListener("input", slide);
  window.addEventListener("pagehide", () => {
    if (job) fetch(`jobs/${job.id}`, { method: "DELETE", headers: headers(), keepalive: true });
  });
  $("scene").addEventListener("click", takeScene);
  $("copy").addEventListener("click", () => navigator.clipboard?.writeText($("made-seed").value));
}

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Returns the JSON answer, or throws an error whose message is a sentence.
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch {
    throw new Error("The service cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  let message = told?.error?.message ?? `The service answered ${response.status}.`;
  if (response.status === 401 && !$("key").value) message = "Enter the service's key first.";
  const wait = response.headers.get("Retry-After");
  if (wait) message += `. Try again in ${wait} seconds.`;
  const error = new Error(message);
  error.status = response.status;
  throw error;
}

async function ask() {
  try {
    about = await (await call("about")).json();
    $("key-field").hidden = !about.key_required;
    tell("");
  } catch (error) {
    $("key-field").hidden = error.status !== 401;
    $("about").textContent = error.status === 401 ? "This service needs a key." : error.message;
    return;
  }
  const where = about.device ? ` on ${about.device}` : "";
  $("about").textContent = `${about.model}${where}, ${about.state}, version ${about.version}`;
  const spark = about.model === "spark";
  $("spark-note").hidden = !spark;
  if (spark) $("prompt").placeholder = "make the yellow circle blue"; // of the drawn scene
  $("steps").value ||= about.default_steps;
  offer(about.qualities, about.quality);
  if (about.state === "starting") setTimeout(ask, 1000);
}

function offer(qualities, usual) {
  const chosen = new FormData($("form")).get("quality") ?? usual;
  const labels = qualities.map(({ name, about }) => {
    const [label, input, shown, title, does] = ["label", "input", "span", "b", "small"].map((tag) =>
      document.createElement(tag),
    );
    Object.assign(input, { type: "radio", name: "quality", value: name });
    input.checked = name === chosen;
    title.textContent = name;
    does.textContent = about;
    shown.append(title, " ", does);
    label.append(input, shown);
    return label;
  });
  $("qualities").querySelectorAll("label").forEach((label) => label.remove());
  $("qualities").append(...labels);
  $("qualities").hidden = labels.length < 2;
}

async function choose(file) {
  if (!file) return;
  if (about && file.size > about.max_bytes) {
    return tell(`This picture has ${file.size} bytes; the service takes ${about.max_bytes}.`);
  }
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    return tell("This file cannot be read as a picture. Use PNG, JPEG or WebP.");
  }
  const pixels = image.naturalWidth * image.naturalHeight;
  if (about && pixels > about.max_pixels) {
    URL.revokeObjectURL(url);
    return tell(`This picture has ${pixels} pixels; the service takes ${about.max_pixels}.`);
  }
  const last = picture;
  picture = { blob: file, url, shape: image.naturalWidth / image.naturalHeight };
  release(last);
  $("chosen").src = url;
  $("chosen").hidden = false;
  $("drop-hint").hidden = true;
  tell("");
}

// Frees a picture that the page no longer shows.
function release(old) {
  if (old && ![picture, asked, before].includes(old)) URL.revokeObjectURL(old.url);
}

async function takeScene() {
  try {
    await choose(await (await call("page/scene.png")).blob());
  } catch (error) {
    tell(error.message);
  }
}

function fields() {
  const body = new FormData();
  body.set("prompt", $("prompt").value.trim());
  for (const name of [...NUMBERS, "negative_prompt", "output_format"]) {
    if ($(name).value !== "") body.set(name, $(name).value);
  }
  const quality = new FormData($("form")).get("quality");
  if (quality) body.set("quality", quality);
  if (picture) body.set("image", picture.blob, "picture");
  return body;
}

async function edit() {
  if (!$("prompt").value.trim()) return tell("Write an instruction first.", $("prompt"));
  for (const name of NUMBERS) {
    if (!$(name).checkValidity()) return tell(`${name}: ${$(name).validationMessage}`, $(name));
  }
  tell("");
  busy(true);
  asked = picture;
  try {
    job = await begin();
    await follow(job.id);
    if (job.status === "done") show(job.result);
    else tell(job.status === "cancelled" ? "Cancelled." : job.error.message);
  } catch (error) {
    tell(error.message);
  } finally {
    busy(false);
    const last = asked;
    asked = job = null;
    release(last);
  }
}

// Sends the request. If the user cancels meanwhile, it cancels the job that may start anyway.
async function begin() {
  const answer = call("jobs", { method: "POST", body: fields() }).then((sent) => sent.json());
  const stopped = new Promise((_, fail) => {
    stopSending = () => {
      answer.then((begun) => call(`jobs/${begun.id}`, { method: "DELETE" })).catch(() => {});
      fail(new Error("Cancelled."));
    };
  });
  try {
    return await Promise.race([answer, stopped]);
  } finally {
    stopSending = null;
  }
}

async function cancel() {
  $("cancel").disabled = true;
  stopSending?.();
  try {
    if (job) await call(`jobs/${job.id}`, { method: "DELETE" });
  } catch (error) {
    tell(error.message);
  }
}

// Follows the job's events; if the connection breaks, polls every second.
async function follow(id) {
  try {
    const response = await call(`jobs/${id}/events`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) progress(JSON.parse(data.slice(6)));
      }
    }
  } catch (error) {
    if (error.status) throw error;
  }
  for (let tries = 0; !ENDED.includes(job.status); ) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    try {
      progress(await (await call(`jobs/${id}`)).json());
      tries = 0;
    } catch (error) {
      if (error.status || ++tries > 30) throw error;
    }
  }
}

function progress(now) {
  job = now;
  $("bar").max = now.steps;
  $("bar").value = now.step;
  if (now.status === "queued") {
    const ahead = now.position ?? 0;
    $("progress-text").textContent = ahead ? `${ahead} before this one` : "Next in the queue";
  } else if (now.status === "running") {
    $("progress-text").textContent = `Step ${now.step} of ${now.steps}`;
  }
}

function busy(is) {
  $("edit").disabled = is;
  $("cancel").hidden = !is;
  $("cancel").disabled = false;
  $("progress").hidden = !is;
  if (is) {
    $("bar").value = 0;
    $("progress-text").textContent = "Sending";
  }
}

function show(result) {
  const last = before;
  before = asked;
  release(last);
  $("empty-hint").hidden = true;
  $("pair").hidden = false;
  $("pair").classList.toggle("single", !before);
  for (const id of ["before", "before-tag", "after-tag", "slider"]) $(id).hidden = !before;
  if (before) $("before").src = before.url;
  $("slider").value = 50;
  slide();
  const thumbs = result.images.map((made, number) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = made.data_url ?? made.url;
    image.alt = `Result ${number + 1}`;
    button.type = "button";
    button.append(image);
    button.addEventListener("click", () => pick(result, number));
    return button;
  });
  $("thumbs").replaceChildren(...thumbs);
  $("thumbs").hidden = thumbs.length < 2;
  pick(result, 0);
  account(result);
  $("outcome").hidden = false;
}

function pick(result, number) {
  const made = result.images[number];
  const source = made.data_url ?? made.url;
  $("after").src = source;
  fit(made.width / made.height);
  $("download").href = source;
  $("download").download = made.filename;
  $("made-seed").value = made.seed;
  [...$("thumbs").children].forEach((thumb, n) => thumb.setAttribute("aria-pressed", n === number));
  $("further").onclick = async () => {
    try {
      await choose(new File([await bytesOf(source)], made.filename));
      $("prompt").focus();
    } catch {
      tell("The result could not be fetched from the store; download it, and choose it here.");
    }
  };
}

// Kontext stretches a picture slightly to a size that it knows, so the page stretches the source
// too. With another aspect ratio the two cannot be overlaid, and the source keeps its own.
function fit(shape) {
  $("pair").style.setProperty("--shape", shape);
  const other = before && Math.abs(Math.log(before.shape / shape)) > 0.2;
  $("before").classList.toggle("other-shape", Boolean(other));
}

// The page's content policy forbids fetching a data: URL, so this code decodes it.
async function bytesOf(source) {
  if (!source.startsWith("data:")) return (await fetch(source)).blob();
  return Uint8Array.from(atob(source.slice(source.indexOf(",") + 1)), (char) => char.charCodeAt(0));
}

function account(result) {
  const count = (kind) => result.steps.filter((step) => step === kind).length;
  const [hits, reused, all] = [count("hit"), count("reused"), result.steps.length];
  $("strip").replaceChildren(
    ...result.steps.map((kind) => {
      const cell = document.createElement("i");
      cell.className = kind;
      return cell;
    }),
  );
  const told = [];
  if (hits) told.push(`${hits} of ${all} steps ran only the first block`);
  if (reused) told.push(`${reused} of ${all} reused the reference`);
  const saved = told.length ? `${told.join("; ")}.` : `All ${all} steps were computed in full.`;
  $("saved").textContent = `${saved} Quality: ${result.quality}.`;
  $("strip").setAttribute("aria-label", saved);
  const { waiting, inference } = result.timings;
  const seconds = (value) => `${value.toFixed(2)} s`;
  $("timings").textContent =
    `${seconds(result.total_time)} in all: ${seconds(inference)} in the pipeline, ` +
    `${seconds(waiting)} waiting. ${result.images[0].width} × ${result.images[0].height} pixels.`;
}

function slide() {
  $("pair").style.setProperty("--at", `${$("slider").value}%`);
}

function tell(message, field) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
  field?.focus();
}

start();
