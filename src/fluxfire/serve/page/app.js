// The service's page: choose a picture, send it, follow the job, compare the result.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["steps", "seed", "num_images", "guidance_scale", "true_cfg_scale"];
const ENDED = ["done", "failed", "cancelled"];
const SHAPES = [
  // The sizes that Kontext prefers; without one a picture keeps its own shape.
  ["as it is", null],
  ["1:1", [1024, 1024]],
  ["3:2", [1248, 832]],
  ["2:3", [832, 1248]],
  ["16:9", [1392, 752]],
  ["9:16", [752, 1392]],
  ["4:3", [1184, 880]],
  ["3:4", [880, 1184]],
];
const QUALITIES = {
  faithful: "Skips nothing, and takes the longest.",
  balanced: "Skips some steps; details may differ.",
  fast: "Skips the most; more may differ.",
};
const STATES = {
  starting: "the model is loading",
  stalled: "the model does not answer",
  draining: "the service is stopping",
};
const MOST_KEPT = 30; // pictures in the history
const TAKEN = ["image/png", "image/jpeg", "image/webp"]; // what the service reads
const LARGE = 2e6; // bytes above which the history keeps a smaller copy of a source picture
const START = 12; // where the slider begins: nearly all of the new picture is seen

let about = null;
let reached = true; // whether the service answered the last question
let asking = null; // the timer of the next question
let picture = null; // {blob, shape, name}: what is to be edited
let asked = null; // the picture of the edit that runs
let shown = null; // the result on the stage
let kept = []; // the results of the history, newest first
let job = null;
let stopSending = null; // ends the wait for an answer to what is being sent
let run = null; // {began, first, last, lost}: when the edit began, and made its first and last step;
// and whether a worker that had it died

async function start() {
  $("key").value = sessionStorage.getItem("key") ?? "";
  offerShapes();
  wirePicture();
  wireForm();
  wireResult();
  await Promise.all([ask(), recall(), offerExamples()]);
}

function wirePicture() {
  const drop = $("drop");
  drop.addEventListener("click", () => $("file").click());
  drop.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (!sends(event)) $("file").click();
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
  $("scene").addEventListener("click", () => $("examples").querySelector("button")?.click());
  $("remove").addEventListener("click", () => {
    take(null);
    drop.focus();
  });
}

function wireForm() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    edit();
  });
  $("form").addEventListener("keydown", (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    edit();
  });
  $("form").addEventListener("input", () => {
    steer();
    command();
  });
  $("key").addEventListener("change", () => {
    sessionStorage.setItem("key", $("key").value);
    tell("");
    ask();
  });
  $("cancel").addEventListener("click", cancel);
  for (const kind of ["curl", "python"]) {
    $(`copy-${kind}`).addEventListener("click", () => copy($(kind), $(`copy-${kind}`)));
  }
  window.addEventListener("pagehide", () => {
    if (job) fetch(`jobs/${job.id}`, { method: "DELETE", headers: headers(), keepalive: true });
  });
  setInterval(clock, 500);
}

function wireResult() {
  $("slider").addEventListener("input", slide);
  $("copy").addEventListener("click", () => copy($("made-seed"), $("copy")));
  $("further").addEventListener("click", editFurther);
  $("after").addEventListener("error", () => {
    if (shown) tell("The result cannot be shown here. Download it to see it.");
  });
  wireHold($("hold"));
  $("clear").addEventListener("click", clearHistory);
  $("full").addEventListener("click", () => {
    zoom(false);
    $("zoomed").src = $("after").src;
    $("zoom").showModal();
  });
  $("zoom-size").addEventListener("click", () => zoom(!$("zoom").classList.contains("actual")));
  $("zoomed").addEventListener("click", () => zoom(!$("zoom").classList.contains("actual")));
  $("zoom-close").addEventListener("click", () => $("zoom").close());
}

// While the button is pressed, by pointer or key, the whole of the old picture is seen.
function wireHold(button) {
  const hold = (is) => {
    $("pair").classList.toggle("held", is);
    button.setAttribute("aria-pressed", is);
  };
  button.addEventListener("pointerdown", (event) => {
    button.setPointerCapture(event.pointerId); // so that the release is told, wherever it happens
    hold(true);
  });
  for (const kind of ["pointerup", "pointercancel", "blur", "keyup"]) {
    button.addEventListener(kind, () => hold(false));
  }
  button.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") hold(true);
  });
  button.addEventListener("contextmenu", (event) => event.preventDefault()); // a long touch
}

const sends = (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey);

// ---- Asking the service ----

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Returns the answer, or throws an error whose message is a sentence.
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch {
    throw new Error("The service cannot be reached.");
  }
  if (response.ok) return response;
  const told = (await response.json().catch(() => null))?.error;
  let message = sentence(told?.message ?? `The service answered ${response.status}`);
  if (told?.code === "key-wanted") message = "Enter the service's key first.";
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` Try again in ${wait} seconds.`;
  const error = new Error(message);
  error.status = response.status;
  throw error;
}

function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

// Asks what the service is and how it does; asks again as long as the answer will change.
async function ask() {
  clearTimeout(asking);
  let again = job ? 1000 : 5000;
  try {
    about = await (await call("about")).json();
    reached = true;
    describe();
    again = job || STATES[about.state] ? 1000 : null; // milliseconds
  } catch (error) {
    reached = Boolean(error.status);
    if (error.status === 401) {
      again = null;
      wantKey(error);
    } else {
      $("about").textContent = error.message;
    }
  }
  describeProgress();
  clearTimeout(asking); // another question may have been asked meanwhile
  if (again) asking = setTimeout(ask, again);
}

function wantKey(error) {
  about = null; // what another key was told
  $("key-field").hidden = false;
  $("about").textContent = "This service needs a key.";
  if ($("key").value) tell(error.message);
}

function describe() {
  $("key-field").hidden = !about.key_required;
  const where = about.device ? ` on ${about.device}` : "";
  const state = STATES[about.state] ?? about.state;
  const trouble = about.trouble ? `. ${sentence(about.trouble)}` : "";
  $("about").textContent = `${about.model}${where}, ${state}, version ${about.version}${trouble}`;
  const spark = about.model === "spark";
  $("spark-note").hidden = !spark;
  if (spark) $("prompt").placeholder = "replace the cactus with a castle"; // the first example
  $("steps").value ||= about.default_steps;
  offerQualities(about.qualities, about.quality);
  command();
}

// ---- What can be chosen ----

function offerQualities(qualities, usual) {
  const inputs = [...$("qualities").querySelectorAll("input")];
  $("qualities").hidden = qualities.length < 2;
  // The same choice is not built anew, or the keyboard's focus would be lost.
  if (String(inputs.map((input) => input.value)) === String(qualities.map(({ name }) => name))) return;
  const chosen = chosenOf("quality") ?? usual;
  const labels = qualities.map(({ name, about }) => {
    const does = element("small", about);
    const why = element("small", QUALITIES[name] ?? "", "why");
    return radio("quality", name, name === chosen, element("b", name), " ", does, " ", why);
  });
  $("qualities").querySelectorAll("label").forEach((label) => label.remove());
  $("qualities").append(...labels);
}

function offerShapes() {
  const labels = SHAPES.map(([name, size]) => {
    const icon = element("i");
    if (size) icon.style.aspectRatio = `${size[0]} / ${size[1]}`;
    icon.classList.toggle("tall", Boolean(size) && size[1] > size[0]);
    icon.classList.toggle("free", !size);
    const label = radio("shape", name, !size, icon, name);
    label.title = size ? size.join(" × ") : "The picture's own shape; 1:1 without a picture";
    return label;
  });
  $("shapes").append(...labels);
}

function radio(group, value, checked, ...content) {
  const [label, input, face] = [element("label"), element("input"), element("span")];
  Object.assign(input, { type: "radio", name: group, value, checked });
  face.append(...content);
  label.append(input, face);
  return label;
}

function element(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}

const chosenOf = (group) => new FormData($("form")).get(group);

// The service takes true guidance and the words to avoid only together.
function steer() {
  $("true_cfg_scale").disabled = !$("negative_prompt").value.trim();
}

async function choose(file) {
  if (!file) return false;
  if (!TAKEN.includes(file.type)) file = await converted(file);
  if (about && file.size > about.max_bytes) {
    return tell(`This picture has ${file.size} bytes; the service takes ${about.max_bytes}.`);
  }
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return tell("This file cannot be read as a picture. Use PNG, JPEG or WebP.");
  } finally {
    URL.revokeObjectURL(url);
  }
  const pixels = image.naturalWidth * image.naturalHeight;
  if (about && pixels > about.max_pixels) {
    return tell(`This picture has ${pixels} pixels; the service takes ${about.max_pixels}.`);
  }
  const shape = image.naturalWidth / image.naturalHeight;
  take({ blob: file, shape, name: file.name ?? "picture.png" });
  tell("");
  return true;
}

// Makes a PNG of a file that this browser can read and the service cannot, such as an AVIF of a
// phone; any other file stays as it is.
async function converted(file) {
  try {
    const blob = await drawn(await createImageBitmap(file), Infinity, "image/png");
    return new File([blob], `${file.name.replace(/\.\w+$/, "")}.png`, { type: blob.type });
  } catch {
    return file;
  }
}

// Makes a picture the one to edit; null for none.
function take(chosen) {
  picture = chosen;
  if (chosen) $("chosen").src = urlOf(chosen.blob);
  else $("chosen").removeAttribute("src");
  $("file").value = ""; // so that the same file can be chosen again
  $("chosen").hidden = $("remove").hidden = !chosen;
  $("drop-hint").hidden = Boolean(chosen);
  $("edit").textContent = chosen ? "Edit" : "Draw";
  command();
  freeUrls();
}

// Shows the pictures that Spark has edited before, which fill the form when they are pressed.
async function offerExamples() {
  try {
    const examples = await (await call("page/examples.json")).json();
    $("examples").replaceChildren(...examples.map(cardOf));
    $("examples").hidden = false;
  } catch {
    $("empty-hint").textContent = "The result comes here.";
  }
}

function cardOf(example) {
  const card = element("button", "", "quiet");
  card.type = "button";
  for (const part of ["before", "after"]) {
    const image = element("img");
    Object.assign(image, { src: `page/${example.name}-${part}.webp`, alt: part });
    card.append(image);
  }
  card.append(element("span", example.words));
  card.addEventListener("click", () => takeExample(example).catch((error) => tell(error.message)));
  return card;
}

async function takeExample({ name, words, seed }) {
  const [before, after] = await Promise.all(
    ["before", "after"].map(async (part) => (await call(`page/${name}-${part}.webp`)).blob()),
  );
  const file = new File([before], `${name}.webp`, { type: before.type });
  if (!(await choose(file))) return;
  $("prompt").value = words;
  $("seed").value = seed;
  command();
  if (run) return; // the stage is the running edit's
  const { width, height } = await createImageBitmap(after);
  const made = { blob: after, url: null, filename: `${name}-after.webp`, seed, width, height };
  show({ words, images: [made], before: picture, example: true });
  $("stage").scrollIntoView({ block: "nearest" });
}

// ---- URLs of pictures ----

const urls = new Map(); // by blob

function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

// Frees the pictures that the page no longer needs.
function freeUrls() {
  const results = [shown, ...kept].filter(Boolean);
  const used = new Set([picture?.blob, asked?.blob]);
  for (const { images, before } of results) {
    for (const { blob } of images) used.add(blob);
    used.add(before?.blob);
  }
  for (const [blob, url] of urls) {
    if (used.has(blob)) continue;
    URL.revokeObjectURL(url);
    urls.delete(blob);
  }
}

// ---- The request ----

// Returns the form's fields without the picture, as pairs of name and text.
function settings() {
  const pairs = [["prompt", $("prompt").value.trim()]];
  for (const name of [...NUMBERS, "output_format"]) {
    if ($(name).value !== "" && !$(name).disabled) pairs.push([name, $(name).value]);
  }
  const avoid = $("negative_prompt").value.trim();
  if (avoid) pairs.push(["negative_prompt", avoid]);
  const size = SHAPES.find(([name]) => name === chosenOf("shape"))?.[1];
  if (size) pairs.push(["width", String(size[0])], ["height", String(size[1])]);
  const quality = chosenOf("quality");
  if (quality) pairs.push(["quality", quality]);
  return pairs;
}

function body() {
  const form = new FormData();
  for (const [name, value] of settings()) form.set(name, value);
  if (picture) form.set("image", picture.blob, "picture");
  return form;
}

// Shows the request as a command of a shell. It has $KEY in place of the key.
function command() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = [`curl ${quoted(new URL("inference", location.href).href)} -o answer.json`];
  if (about?.key_required ?? !$("key-field").hidden) parts.push('-H "Authorization: Bearer $KEY"');
  // Unlike -F, --form-string takes a value that begins with @ for what it is.
  for (const [name, value] of settings()) parts.push(`--form-string ${quoted(`${name}=${value}`)}`);
  if (picture) {
    const name = picture.name.replace(/["\\]/g, "\\$&");
    parts.push(`-F ${quoted(`image=@"${name}"`)}`);
  }
  $("curl").textContent = parts.join(" \\\n  ");
  $("python").textContent = program(parts.some((part) => part.includes("$KEY")));
}

// Returns the request as a program. A JSON string is one of Python, too.
function program(keyed) {
  const number = (name) => NUMBERS.includes(name) || name === "width" || name === "height";
  const fields = settings().map(([name, value]) => {
    return `    "${name}": ${number(name) ? Number(value) : JSON.stringify(value)},`;
  });
  if (picture) {
    const read = `Path(${JSON.stringify(picture.name)}).read_bytes()`;
    fields.push(`    "image": base64.b64encode(${read}).decode(),`);
  }
  return [
    "import base64",
    ...(keyed ? ["import os"] : []),
    "from pathlib import Path",
    "from urllib.parse import urljoin",
    "",
    "import httpx",
    "",
    `url = ${JSON.stringify(new URL("inference", location.href).href)}`,
    "request = {",
    ...fields,
    "}",
    ...(keyed ? [`headers = {"Authorization": f"Bearer {os.environ['KEY']}"}`] : []),
    `answer = httpx.post(url, json=request, ${keyed ? "headers=headers, " : ""}timeout=600)`,
    "if answer.is_error:",
    "    raise SystemExit(answer.text)",
    'for image in answer.json()["images"]:',
    '    if image["data_url"]:',
    '        data = base64.b64decode(image["data_url"].partition(",")[2])',
    "    else:",
    '        data = httpx.get(urljoin(url, image["url"])).raise_for_status().content',
    '    Path(image["filename"]).write_bytes(data)',
    "",
  ].join("\n");
}

async function edit() {
  if (run) return;
  if (!$("prompt").value.trim()) return tell("Write an instruction first.", $("prompt"));
  for (const name of NUMBERS) {
    if (!$(name).checkValidity()) {
      if ($("more").contains($(name))) $("more").open = true;
      const label = $(name).labels[0].firstChild.textContent.trim();
      return tell(`${label}: ${$(name).validationMessage}`, $(name));
    }
  }
  tell("");
  busy(true);
  asked = picture;
  const words = $("prompt").value.trim();
  try {
    job = await begin();
    ask();
    await follow(job.id);
    if (job.status === "done") {
      const result = await received(job, words, asked);
      show(result);
      await keep(result);
    } else {
      tell(job.status === "cancelled" ? "Cancelled." : sentence(job.error.message));
    }
  } catch (error) {
    tell(error.message, error.status === 401 ? $("key") : null);
  } finally {
    asked = job = null;
    busy(false);
    freeUrls();
  }
}

// Sends the request. If the user cancels meanwhile, it cancels the job that may start anyway.
async function begin() {
  const answer = call("jobs", { method: "POST", body: body() }).then((sent) => sent.json());
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

// ---- Progress ----

function progress(now) {
  const last = { step: now.step, at: performance.now() };
  // A worker that died begins anew, so its steps are counted anew, too.
  run.lost ||= job?.status === "running" && now.status === "queued";
  if (now.status === "queued" || now.step < (job?.step ?? 0)) run.first = run.last = null;
  else if (now.step > 0 && now.step !== run.last?.step) run.last = last;
  run.first ??= run.last;
  job = now;
  $("bar").max = now.steps;
  $("bar").value = now.step;
  describeProgress();
}

function describeProgress() {
  if (!run || !job) return;
  const [queued, ahead, state] = [job.status === "queued", job.position ?? 0, about?.state];
  let text = `Step ${job.step} of ${job.steps}`;
  if (!reached) text = "The service cannot be reached; the page tries again";
  else if (state === "stalled") text = "The model does not answer";
  else if (state === "starting" && run.lost) text = "The worker was replaced; the model is loading";
  else if (queued && state === "starting") text = "The model is loading";
  else if (queued) text = ahead ? `${ahead} before this one` : "Next in the queue";
  if ($("progress-text").textContent !== text) $("progress-text").textContent = text;
  clock();
}

// Tells the time since the beginning, and what the steps so far let expect of the others.
function clock() {
  if (!run) return;
  const now = performance.now();
  let text = duration(now - run.began);
  if (job && run.last && run.last.step > run.first.step && run.last.step < job.steps) {
    const each = (run.last.at - run.first.at) / (run.last.step - run.first.step);
    const left = each * (job.steps - run.last.step) - (now - run.last.at);
    text += `, about ${duration(Math.max(left, 1000))} left`;
  }
  $("clock").textContent = text;
}

function duration(milliseconds) {
  const seconds = Math.round(milliseconds / 1000);
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

function busy(is) {
  run = is ? { began: performance.now(), first: null, last: null, lost: false } : null;
  $("edit").disabled = is;
  $("cancel").disabled = false;
  $("progress").hidden = !is;
  $("stage").classList.toggle("waiting", is); // it dims the old result
  if (is) {
    // On a phone the stage lies below the form.
    if ($("stage").getBoundingClientRect().top > innerHeight / 2) $("stage").scrollIntoView();
    $("bar").value = 0;
    $("progress-text").textContent = "Sending";
    clock();
  }
}

// ---- The result ----

// Makes an answer a result as the page and its history have it: with blobs, where it may read them.
async function received({ id, result }, words, source) {
  const images = await Promise.all(
    result.images.map(async ({ data_url, url, filename, seed, width, height }, number) => {
      const blob = data_url ? decoded(data_url) : await read(id, number);
      return { blob, url, filename, seed, width, height };
    }),
  );
  const { steps, quality, timings, total_time, warnings } = result;
  return { words, images, before: source, steps, quality, timings, total_time, warnings };
}

// Decodes a data: URL. The content policy forbids to fetch it.
function decoded(source) {
  const [head, coded] = source.split(",");
  const bytes = Uint8Array.from(atob(coded), (char) => char.charCodeAt(0));
  return new Blob([bytes], { type: head.slice("data:".length).split(";")[0] });
}

// Reads a stored picture by way of the service: most buckets let no page read them.
async function read(id, number) {
  try {
    return await (await call(`jobs/${id}/images/${number}`)).blob();
  } catch {
    return null;
  }
}

const sourceOf = (made) => (made.blob ? urlOf(made.blob) : made.url);

function show(result) {
  shown = result;
  const { before, images } = result;
  $("empty-hint").hidden = true;
  $("pair").hidden = false;
  $("pair").classList.toggle("single", !before);
  for (const id of ["before", "before-tag", "after-tag", "slider", "hold"]) $(id).hidden = !before;
  if (before) $("before").src = urlOf(before.blob);
  $("slider").value = START;
  slide();
  const thumbs = images.map((made, number) => {
    const thumb = thumbOf(made, `Result ${number + 1}`);
    thumb.addEventListener("click", () => pick(number));
    return thumb;
  });
  $("thumbs").replaceChildren(...thumbs);
  $("thumbs").hidden = thumbs.length < 2;
  $("made-words").textContent = result.words;
  $("warnings").replaceChildren(...(result.warnings ?? []).map((text) => element("li", sentence(text))));
  $("warnings").hidden = !result.warnings?.length;
  pick(0);
  for (const id of ["strip", "saved", "legend", "timings"]) $(id).hidden = Boolean(result.example);
  $("example-note").hidden = !result.example;
  if (!result.example) account(result);
  $("outcome").hidden = false;
  showHistory();
  freeUrls();
}

function thumbOf(made, name) {
  const [button, image] = [element("button"), element("img")];
  image.src = sourceOf(made);
  image.alt = name;
  button.type = "button";
  button.append(image);
  return button;
}

function pick(number) {
  const made = shown.images[number];
  shown.picked = number;
  $("after").src = sourceOf(made);
  fit(made.width / made.height);
  $("download").href = sourceOf(made);
  $("download").download = made.filename;
  // A browser ignores `download` for another host, and would leave the page.
  if (made.blob) $("download").removeAttribute("target");
  else Object.assign($("download"), { target: "_blank", rel: "noopener" });
  $("further").disabled = !made.blob;
  $("unreadable").hidden = Boolean(made.blob);
  $("further").setAttribute("aria-describedby", made.blob ? "" : "unreadable");
  $("made-seed").value = made.seed;
  [...$("thumbs").children].forEach((thumb, n) => thumb.setAttribute("aria-pressed", n === number));
}

async function editFurther() {
  const made = shown.images[shown.picked];
  await choose(new File([made.blob], made.filename, { type: made.blob.type }));
  $("prompt").focus();
}

// Kontext stretches a picture slightly to a size that it knows, so the page stretches the source
// too. With another aspect ratio the two cannot be overlaid, and the source keeps its own.
function fit(shape) {
  $("pair").style.setProperty("--shape", shape);
  const other = shown.before && Math.abs(Math.log(shown.before.shape / shape)) > 0.2;
  $("before").classList.toggle("other-shape", Boolean(other));
}

function account(result) {
  const count = (kind) => result.steps.filter((step) => step === kind).length;
  const [hits, reused, all] = [count("hit"), count("reused"), result.steps.length];
  $("strip").replaceChildren(...result.steps.map((kind) => element("i", "", kind)));
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

function zoom(actual) {
  $("zoom").classList.toggle("actual", actual);
  $("zoom-size").setAttribute("aria-pressed", actual);
}

// ---- The history ----

// Does something with the browser's store of results, and returns what it gives.
function inStore(mode, act) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("fluxfire", 1);
    opening.onupgradeneeded = () =>
      opening.result.createObjectStore("results", { keyPath: "id", autoIncrement: true });
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
      const transaction = opening.result.transaction("results", mode);
      const request = act(transaction.objectStore("results"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
      opening.result.close(); // once the transaction has ended
    };
  });
}

async function recall() {
  try {
    kept = [...kept, ...(await inStore("readonly", (store) => store.getAll())).reverse()];
  } catch {
    // Some browsers refuse it in private windows. Then the history ends with the page.
  }
  await forgetOldest();
  showHistory();
}

// Adds a result to the history, unless the page cannot read its pictures: their links expire.
async function keep(result) {
  if (!result.images.every(({ blob }) => blob)) return;
  kept.unshift(result);
  showHistory();
  try {
    const small = { ...result, before: result.before && (await smaller(result.before)) };
    result.id = await inStore("readwrite", (store) => store.add(small));
  } catch {
    // The store is refused or full; the page still has the result.
  }
  await forgetOldest();
  showHistory();
}

// Returns a source picture with at most about a megapixel, if its file is large.
async function smaller({ blob, shape, name }) {
  if (blob.size <= LARGE) return { blob, shape, name };
  return { blob: await drawn(await createImageBitmap(blob), 1e6, "image/webp"), shape, name };
}

// Draws a picture anew, with so many pixels at most, and returns it as a file of a kind.
async function drawn(image, pixels, kind) {
  const scale = Math.min(1, Math.sqrt(pixels / (image.width * image.height)));
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return new Promise((resolve) => canvas.toBlob(resolve, kind, 0.9));
}

async function forgetOldest() {
  const count = () => kept.reduce((sum, { images }) => sum + images.length, 0);
  const old = [];
  while (count() > MOST_KEPT && kept.length > 1) old.push(kept.pop());
  await forget(old);
}

async function forget(results) {
  try {
    for (const { id } of results) {
      if (id !== undefined) await inStore("readwrite", (store) => store.delete(id));
    }
  } catch {
    // It is tried again when the page is loaded next.
  }
}

async function clearHistory() {
  if (!confirm("Delete the earlier results from this browser?")) return;
  kept = [];
  showHistory();
  freeUrls();
  $("prompt").focus(); // the button is gone
  try {
    await inStore("readwrite", (store) => store.clear());
  } catch (error) {
    tell(`The earlier results could not be deleted. ${sentence(error.message)}`);
  }
}

function showHistory() {
  const thumbs = kept.map((result) => {
    const thumb = thumbOf(result.images[0], result.words);
    thumb.title = result.words;
    if (result.images.length > 1) thumb.append(element("span", `+${result.images.length - 1}`, "tag"));
    if (result === shown) thumb.setAttribute("aria-current", "true");
    thumb.addEventListener("click", () => {
      show(result);
      $("kept").children[kept.indexOf(result)]?.focus();
      $("stage").scrollIntoView({ block: "nearest" });
    });
    return thumb;
  });
  $("kept").replaceChildren(...thumbs);
  $("history").hidden = !thumbs.length;
}

// ---- Small things ----

// Copies an element's text, or selects it where the browser gives the page no clipboard.
async function copy(from, button) {
  try {
    await navigator.clipboard.writeText(from.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  } catch {
    getSelection().selectAllChildren(from);
  }
}

function tell(message, field) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
  if (message) $("problem").scrollIntoView({ block: "nearest" });
  field?.focus();
}

start();
