// The studio: a client of the server's interface, which keeps nothing but texts that are not saved yet.
// Whatever a person, a model or a file says becomes text, never HTML.
"use strict";

const UNSAVED = "instructblip-unsaved";
const POLL_MS = 1500;
const REASONS = new Set(["unreadable", "row", "placeholder", "over-long answer", "over-long prompt"]); // of findings
const FOLDER_TURNS = 3; // the folder is read less often than the run
let project, run, results, selected, entry, filter = "all", lastQuestion = "", uploading = false;

const fill = (key, ...values) => values.reduce((text, value, at) => {
  return text.replaceAll(`{${at}}`, () => value);
}, words(key));

/** A message of the server in the language of the page; of one without a translation, its English under a heading. */
function translated(message) {
  message = message?.replace(/^messages(, image \d+)?: /, "");
  if (!message || language !== "zh") return message;
  if (page.labels.no_server.includes(message)) return words("no_server");
  for (const [english, chinese] of Object.entries(page.messages)) {
    const plain = english.replace(/[.*+?^$()|[\]\\]/g, "\\$&");
    const pattern = plain.replace(/^\{0\}: /, "(?:([^]*?): )?").replace(/\{\d\}/g, "([^]*?)");
    const found = new RegExp(`^${pattern}$`).exec(message);
    if (found) return chinese.replace(/\{(\d)\}/g, (_, at) => found[Number(at) + 1] ?? "");
  }
  return fill("unknown", message);
}

const get = async (path) => (await send(`v1/studio${path}`)).json();
const post = async (path, body = {}) => (await send(`v1/studio${path}`, body)).json();
const pictureUrl = (name, size) => `v1/studio/picture?name=${encodeURIComponent(name)}&size=${size}`;
const isRunning = () => run?.status === "running";

// Rows: what the page knows of each, and what is not saved yet

/**
 * One question about a picture. `stored` is what the folder has of it; other texts are a draft until
 * they are saved. `theirs` is what another window made of it.
 */
class Entry {
  constructor(image, { id = "", version = "", question = "", answer = "", choices = [] } = {}) {
    Object.assign(this, { image, id, version, question, answer, choices });
    this.stored = { question, answer };
    this.problem = "";
    this.isOffline = false;
    this.theirs = this.saving = null;
  }

  get isDraft() {
    return this.question !== this.stored.question || this.answer !== this.stored.answer;
  }

  /** A text that waits, and that nobody writes at the moment. */
  get isUnsaved() {
    const isWritten = this === entry && !this.problem && !this.theirs;
    return this.isDraft && !this.saving && !isWritten;
  }

  /** Takes the row of the folder; what is typed here and not saved stays. */
  take({ question, answer, choices, version }) {
    if (!this.isDraft) Object.assign(this, { question, answer, choices, version });
    this.stored = { question, answer };
  }

  /** The text has changed. */
  touch() {
    this.problem = "";
    keepUnsaved();
    showState();
  }

  async save() {
    while (this.saving) await this.saving;
    if (!this.isDraft || this.theirs) return;
    if (!this.id && !this.question.trim() && !this.answer.trim()) {
      this.stored = { question: this.question, answer: this.answer };
      return keepUnsaved();
    }
    this.saving = this.write();
    showState();
    await this.saving;
    this.saving = null;
    keepUnsaved();
    showState();
    showEarlier();
    showTiles();
  }

  async write() {
    const { image, id, version, question, answer } = this;
    this.problem = "";
    try {
      const { row } = await post("/row", { image, id, version, question, answer });
      Object.assign(this, { id: row?.id ?? "", version: row?.version ?? "", stored: { question, answer } });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (error.status === 409) this.disagree(error.answer.row);
      else Object.assign(this, { problem: error.message, isOffline: !error.status });
    }
    writes += 1;
  }

  /** Another window has changed the row, or removed it. */
  disagree(row) {
    const { id = "", version = "", question = "", answer = "" } = row ?? {};
    this.theirs = { id, version, question, answer };
    this.stored = { question, answer };
    if (!this.isDraft) this.settle(false);
  }

  /** Ends a conflict: with these texts, or with the other ones. */
  settle(mine) {
    const { id, version, question, answer } = this.theirs;
    Object.assign(this, { id, version, theirs: null });
    if (mine) this.save();
    else Object.assign(this, { question, answer });
    keepUnsaved();
    showEditor();
    showTiles();
  }
}

let writes = 0; // what the folder had before one of them is news no more
const entries = new Map(); // picture -> its rows

function rowsOf(name) {
  if (!entries.has(name)) entries.set(name, []);
  return entries.get(name);
}

/** Keeps drafts over a reload, the one that is written first. */
function keepUnsaved() {
  const drafts = allEntries().filter((one) => one.isDraft).sort((a, b) => (b === entry) - (a === entry));
  sessionStorage.setItem(UNSAVED, JSON.stringify(drafts.map(({ image, id, version, question, answer }) => {
    return { image, id, version, question, answer };
  })));
}

/** The drafts from before a reload: only a person saves them. Returns the one that was written last. */
function restoreUnsaved() {
  const drafts = [];
  for (const { image, id, version, question, answer } of JSON.parse(sessionStorage.getItem(UNSAVED) ?? "[]")) {
    const rows = rowsOf(image);
    if (rows.some((row) => row.question === question && row.answer === answer)) continue;
    let one = id && rows.find((row) => row.id === id);
    if (!one) rows.push(one = new Entry(image, { id }));
    Object.assign(one, { version, question, answer });
    drafts.push(one);
  }
  return drafts[0];
}

/** Takes the rows of the folder, also of images that are gone. */
function takeRows() {
  const images = new Map(project.images.map(({ name, rows }) => [name, rows]));
  for (const name of new Set([...images.keys(), ...entries.keys()])) {
    const known = new Map(rowsOf(name).map((one) => [one.id, one]));
    const kept = (images.get(name) ?? []).map((row) => {
      const one = known.get(row.id) ?? new Entry(name, row);
      if (!one.saving) one.take(row);
      return one;
    });
    const pending = rowsOf(name).filter((one) => {
      if (kept.includes(one)) return false;
      if (one.id && one.isDraft && !one.saving) one.stored = { question: "", answer: "" };
      const isBlank = !one.id && one === entry && images.has(name) && (one.isExtra || !kept.length);
      return one.saving || one.isDraft || isBlank;
    });
    entries.set(name, [...kept, ...pending]);
    if (!entries.get(name).length) entries.delete(name);
  }
  if (!lastQuestion) lastQuestion = mostFrequent(allEntries().map((one) => one.question))[0] ?? "";
}

const allEntries = () => [...entries.values()].flat();
const isAnswered = (name) => rowsOf(name).some((one) => (one.saving ? one : one.stored).answer.trim());
const isNoticed = (name) => findingsOf(name).length > 0 || rowsOf(name).some((one) => one.isUnsaved);

function mostFrequent(texts) {
  const counts = new Map();
  for (const text of texts) if (text) counts.set(text, (counts.get(text) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([text]) => text);
}

// Pictures from the server, as URLs that the page made

const urls = new Map();

function loadPicture(name, size) {
  const key = `${size} ${name}`;
  if (!urls.has(key)) {
    const loading = send(pictureUrl(name, size)).then(async (response) => {
      return URL.createObjectURL(await response.blob());
    });
    urls.set(key, loading);
    loading.catch(() => urls.delete(key));
  }
  return urls.get(key);
}

async function showPicture(image, name, size) {
  image.dataset.name = name;
  try {
    const url = await loadPicture(name, size);
    if (image.dataset.name === name) image.src = url;
  } catch {
    if (image.dataset.name === name) image.removeAttribute("src");
  }
}

const seen = new IntersectionObserver((changes) => {
  for (const { isIntersecting, target } of changes) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    showPicture(target, target.dataset.name, "small");
  }
}, { rootMargin: "300px" });

function lazyPicture(name) {
  const image = element("img", "", { alt: "" });
  image.dataset.name = name;
  seen.observe(image);
  return image;
}

/** The file of a picture as a data URL, as a request to the model has it. */
async function dataUrl(source) {
  const blob = source instanceof Blob ? source : await (await send(pictureUrl(source, "file"))).blob();
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:[^,;]*/, "data:image/png"));
    reader.readAsDataURL(blob);
  });
}

// The grid

const tiles = new Map();
const findingsOf = (name) => project.findings.filter((one) => one.image === name);

function visible() {
  const names = project.images.map((one) => one.name);
  if (filter === "open") return names.filter((name) => !isAnswered(name) || name === selected);
  if (filter === "noticed") return names.filter(isNoticed);
  return names;
}

function showGrid() {
  const names = visible();
  const known = new Map(project.images.map((one) => [one.name, one]));
  for (const name of tiles.keys()) if (!known.has(name)) tiles.delete(name);
  byId("grid").replaceChildren(...names.map((name) => {
    if (!tiles.has(name)) tiles.set(name, makeTile(known.get(name)));
    return tiles.get(name);
  }));
  byId("grid").setAttribute("aria-label", words("grid"));
  byId("empty").hidden = project.images.length > 0;
  showTiles();
}

function showFilters() {
  const names = project.images.map((one) => one.name);
  const shown = [
    ["all", "all", names.length],
    ["open", "open_ones", names.filter((name) => !isAnswered(name)).length],
    ["noticed", "noticed", names.filter(isNoticed).length],
  ];
  byId("filters").hidden = !names.length;
  byId("filters").replaceChildren(...shown.map(([kind, label, count]) => {
    const button = element("button", `${words(label)} ${count}`, { type: "button" });
    button.setAttribute("aria-pressed", String(filter === kind));
    button.onclick = () => {
      filter = kind;
      showGrid();
    };
    return button;
  }));
}

function makeTile({ name, shown }) {
  const tile = element("button", "", { type: "button", className: "tile", tabIndex: -1 });
  tile.setAttribute("role", "option");
  const view = element("span", shown ? "" : words("no_preview"), { className: "view" });
  if (shown) view.append(lazyPicture(name));
  tile.append(view, element("span", "", { className: "says" }), element("span", "", { className: "mark" }), element("span", "", { className: "split" }));
  tile.onclick = () => select(name, true);
  return tile;
}

/** What stands on the tiles, and how many are answered. */
function showTiles() {
  const order = visible();
  const splits = new Map(project.images.map((one) => [one.name, one.split]));
  for (const [name, tile] of tiles) {
    const [, says, mark, split] = tile.children;
    const part = splits.get(name);
    split.textContent = part ? words(`split_${part}`) : "";
    const answers = rowsOf(name).map((one) => (one.saving ? one : one.stored).answer).filter((text) => text.trim());
    says.textContent = answers.map((text) => text.replaceAll("\n", " / ")).join(" · ") || "–";
    says.classList.toggle("none", !answers.length);
    const isBad = findingsOf(name).some((one) => one.bad);
    mark.className = `mark${isBad ? " bad" : isNoticed(name) ? " look" : ""}`;
    mark.textContent = isNoticed(name) ? "!" : "✓";
    mark.hidden = !isNoticed(name) && !answers.length;
    tile.setAttribute("aria-label", `${name}: ${says.textContent}${isNoticed(name) ? ` (${words("noticed")})` : ""}`);
    tile.setAttribute("aria-selected", String(name === selected));
    tile.tabIndex = name === (order.includes(selected) ? selected : order[0]) ? 0 : -1;
  }
  const answers = allEntries().filter((one) => one.stored.answer.trim()).length;
  const goal = project.worthwhile;
  byId("count").textContent = answers < goal ? fill("of_answers", answers, goal) : fill("answers_enough", answers);
  Object.assign(byId("progress"), { max: goal, value: Math.min(answers, goal) });
  byId("progress").setAttribute("aria-label", byId("count").textContent);
  showFilters();
  showUnsaved();
}

/** A way to the texts that are not saved, from wherever the page is. */
function showUnsaved() {
  const unsaved = allEntries().filter((one) => one.isUnsaved);
  const isSeen = unsaved.every((one) => one === entry) && !byId("label-panel").hidden;
  byId("unsaved").hidden = !unsaved.length || isSeen;
  byId("unsaved").textContent = fill("unsaved", unsaved.length);
  byId("unsaved").onclick = () => {
    showTab("label");
    pick(unsaved.find((one) => one !== entry) ?? entry, true);
  };
}

function moveInGrid(event) {
  const names = visible();
  const columns = getComputedStyle(byId("grid")).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const at = Math.min(names.length - 1, Math.max(0, names.indexOf(selected) + step));
  select(names[at]);
  tiles.get(names[at]).focus();
}

// Adding pictures

async function addFiles(files) {
  if (uploading || !files.length) return;
  uploading = true;
  const counts = { added: 0, there: 0, refused: 0 };
  byId("refusals").replaceChildren();
  for (const [at, file] of files.entries()) {
    byId("uploads").textContent = fill("adding", at + 1, files.length);
    try {
      const { isNew } = await addFile(file);
      counts[isNew ? "added" : "there"] += 1;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      counts.refused += 1;
      byId("refusals").append(element("li", `${file.name}: ${translated(error.message)}`));
    }
    if (at % 12 === 11) await refresh();
  }
  const parts = Object.entries(counts).filter(([, count]) => count);
  byId("uploads").textContent = parts.map(([kind, count]) => fill(kind, count)).join(" · ");
  uploading = false;
  await refresh();
  if (!selected && project.images.length) select(project.images[0].name, true);
}

async function addFile(file) {
  const answer = await post(`/picture?name=${encodeURIComponent(file.name)}`, file);
  return { isNew: answer.new };
}

// The editor

function select(name, focus = false) {
  pick(rowsOf(name)[0] ?? newEntry(name, lastQuestion), focus);
}

function newEntry(name, question) {
  const made = new Entry(name, { question });
  rowsOf(name).push(made);
  return made;
}

/** Shows a row; the one that was shown before is saved. */
function pick(one, focus = false) {
  const before = entry;
  entry = one;
  selected = one.image;
  if (before && before !== one) before.save();
  showEditor();
  showTiles();
  if (matchMedia("(min-width: 901px)").matches) tiles.get(selected)?.scrollIntoView({ block: "nearest" });
  else if (focus) byId("editor").scrollIntoView({ block: "nearest" });
  if (focus) byId("answer").focus({ preventScroll: true });
  suggestSoon();
}

function showEditor() {
  byId("editor").hidden = !entry;
  if (!entry) return;
  const rows = rowsOf(selected);
  if (byId("large").dataset.name !== selected) {
    byId("large").removeAttribute("src");
    showPicture(byId("large"), selected, "large");
  }
  byId("large").alt = selected;
  byId("name").textContent = byId("name").title = selected;
  for (const key of ["question", "answer"]) {
    if (byId(key).value !== entry[key]) byId(key).value = entry[key];
  }
  byId("question").placeholder = words("question_hint");
  byId("answer").placeholder = words("answer_hint");
  byId("rows").replaceChildren(...(rows.length > 1 ? rows : []).map((one) => {
    const button = element("button", one.question || words("question"), { type: "button" });
    button.setAttribute("aria-pressed", String(one === entry));
    button.onclick = () => pick(one, true);
    return button;
  }));
  const more = element("button", words("other_question"), { type: "button", id: "more" });
  more.onclick = () => {
    const made = newEntry(selected, "");
    made.isExtra = true;
    pick(made);
    byId("question").focus();
  };
  byId("rows").append(more);
  byId("findings").replaceChildren(...findingsOf(selected).map((one) => {
    const about = REASONS.has(one.kind) ? translated(one.about) : one.about;
    return element("li", fill(`finding_${one.kind}`, about), { className: one.bad ? "bad" : "" });
  }));
  byId("conflict").hidden = !entry.theirs;
  if (entry.theirs) {
    const said = ({ question, answer }) => [question, answer].filter(Boolean).join(" – ") || words("nothing");
    byId("keep-mine").textContent = fill("keep_mine", said(entry));
    byId("keep-theirs").textContent = fill("keep_theirs", said(entry.theirs));
  }
  showEarlier();
  showState();
  showSuggestion();
}

function showState() {
  if (!entry) return;
  const state = byId("state");
  state.classList.toggle("bad", Boolean(entry.problem));
  state.textContent = entry.problem ? fill("not_saved", translated(entry.problem))
    : entry.saving ? words("saving") : entry.isDraft ? words("draft") : entry.id ? words("saved") : "";
  byId("conflict").hidden = !entry.theirs;
  if (entry.theirs && !byId("keep-mine").textContent) showEditor();
}

/** Answers that the same question had before, to choose with a key. */
function showEarlier() {
  if (!entry) return;
  const question = entry.question.trim().toLowerCase();
  const others = allEntries().filter((one) => one !== entry).map((one) => one.saving ? one : one.stored)
    .filter((texts) => texts.question.trim().toLowerCase() === question);
  const frequent = mostFrequent(others.map((texts) => texts.answer.trim()));
  const texts = [...new Set([...entry.choices, ...frequent])].filter((text) => text.length < 60).slice(0, 9);
  byId("earlier").replaceChildren(...texts.map((text, at) => {
    const button = element("button", "", { type: "button", title: words("earlier") });
    button.append(element("kbd", String(at + 1)), ` ${text}`);
    button.onclick = () => answerWith(text);
    return button;
  }));
}

function answerWith(text) {
  byId("answer").value = entry.answer = text;
  entry.touch();
  byId("answer").focus();
}

function typed() {
  entry.question = byId("question").value;
  entry.answer = byId("answer").value;
  lastQuestion = entry.question;
  entry.touch();
}

/** Saves, and moves to the next picture that has no answer, unless there is a choice to make. */
function next() {
  if (entry.theirs) {
    byId("keep-mine").focus();
    return;
  }
  const names = project.images.map((one) => one.name);
  const at = names.indexOf(selected);
  const others = [...names.slice(at + 1), ...names.slice(0, at)];
  const target = others.find((name) => !isAnswered(name)) ?? others[0];
  if (target) select(target, true);
  else entry.save();
}

function move(step) {
  const names = visible();
  const target = names[names.indexOf(selected) + step];
  if (target) select(target, true);
}

function answerKey(event) {
  const { key, target } = event;
  if (event.isComposing) return;
  const isOneLine = !target.value.includes("\n");
  let work;
  if (event.altKey && /^[1-9]$/.test(key)) work = () => byId("earlier").children[key - 1]?.click();
  else if (event.altKey || event.ctrlKey || event.metaKey) return;
  else if (key === "Enter" && !event.shiftKey) work = next;
  else if (key === "ArrowRight" && !target.value && suggestion?.text) work = take;
  else if (key === "ArrowDown" && isOneLine && !event.shiftKey) work = () => move(1);
  else if (key === "ArrowUp" && isOneLine && !event.shiftKey) work = () => move(-1);
  if (!work) return;
  event.preventDefault();
  work();
}

// The model's suggestion

let suggestion, suggesting, waiting;

function promptOf(question) {
  const isChinese = /[\u3400-\u9fff]/.test(question || allEntries().map((one) => one.answer).join(""));
  const prompts = page.prompts[isChinese ? "zh" : "en"];
  return question.trim() ? prompts.vqa.replace("{question}", () => question.trim()) : prompts.caption;
}

/** What a model says about an image, and how likely that is. */
async function askModel(model, url, question, signal) {
  const content = [{ type: "image_url", image_url: { url } }, { type: "text", text: promptOf(question) }];
  const body = { model, messages: [{ role: "user", content }], logprobs: true };
  const answer = await (await send("v1/chat/completions", body, signal)).json();
  const { message, logprobs } = answer.choices[0];
  const isChecked = logprobs.confidence !== null;
  const chance = isChecked ? logprobs.confidence : Math.exp(logprobs.log_likelihood);
  return { text: message.content.trim(), isChecked, chance };
}

const sureness = ({ chance, isChecked }) => fill(isChecked ? "sure" : "likely", Math.round(100 * chance));

function suggestSoon() {
  suggesting?.abort();
  clearTimeout(waiting);
  suggestion = null;
  showSuggestion();
  if (!isRunning()) waiting = setTimeout(suggest, 250);
}

async function suggest() {
  const mine = suggesting = new AbortController();
  const [name, question] = [selected, entry.question];
  suggestion = { text: "", note: "suggesting" };
  showSuggestion();
  try {
    const made = await askModel(project.current, await dataUrl(name), question, mine.signal);
    if (mine.signal.aborted) return;
    suggestion = made;
  } catch (error) {
    if (error.name === "AbortError" || mine.signal.aborted) return;
    suggestion = { text: "", problem: error.message };
  }
  showSuggestion();
}

function showSuggestion() {
  const isIdle = !suggestion && isRunning();
  const text = suggestion?.text || translated(suggestion?.problem) || (suggestion?.note ? words(suggestion.note) : isIdle ? words("suggest_later") : "");
  byId("suggested").textContent = text;
  const who = words(`model_${project.current}`);
  byId("sure").textContent = suggestion?.text ? `${sureness(suggestion)} (${who})` : "";
  byId("take").hidden = !suggestion?.text;
  byId("suggest").hidden = Boolean(suggestion?.text || suggestion?.note);
}

function take() {
  if (suggestion?.text) answerWith(suggestion.text);
}

// Tuning

const duration = (seconds) => {
  return seconds < 90 ? fill("seconds", Math.max(1, Math.round(seconds))) : fill("minutes", Math.round(seconds / 60));
};

function showTune() {
  const { usable, usable_by_split: counts, least, worthwhile } = project;
  const [learned, held] = [counts.train ?? 0, (counts.val ?? 0) + (counts.test ?? 0)];
  const isReady = project.is_split ? learned > 0 && held > 0 : usable >= least;
  const bad = project.findings.filter((one) => one.bad && one.row).length;
  byId("ready").textContent = project.is_split ? fill(isReady ? "ready_split" : "ready_unsplit", learned, held)
    : usable < least ? fill("ready_few", usable, least, worthwhile)
    : usable < worthwhile ? fill("ready_some", usable, worthwhile) : fill("ready_yes", usable);
  byId("ready-bad").textContent = bad ? fill("ready_bad", bad) : "";
  byId("start-model").textContent = fill("starts_from", project.models.start);
  const { status } = run;
  const isStopped = ["stopped", "failed"].includes(status) && run.resumable;
  byId("tune").hidden = status === "running";
  byId("tune").disabled = !isReady || Boolean(bad) || Boolean(run.busy);
  byId("tune").textContent = words(isStopped ? "anew" : status === "finished" ? "tune_again" : "tune");
  byId("resume").hidden = !isStopped;
  byId("resume").disabled = Boolean(run.busy) || run.changed;
  byId("stop").hidden = status !== "running";
  byId("to-compare").hidden = status !== "finished";
  byId("tune").classList.toggle("second", isStopped || status === "finished");
  const phase = status === "running" ? `phase_${run.phase}` : status === "none" ? "" : `status_${status}`;
  byId("phase").textContent = stopping && status === "running" ? words("stopping") : phase ? words(phase) : "";
  const parts = [];
  if (run.steps && run.step) parts.push(fill("step_of", run.step, run.steps));
  if (status === "running" && run.seconds_left != null) parts.push(fill("left", duration(run.seconds_left)));
  byId("left").textContent = parts.join(" · ");
  byId("steps").hidden = status === "none";
  const bar = byId("steps");
  if (status === "running" && run.phase !== "train") bar.removeAttribute("value");
  else bar.value = status === "finished" ? 1 : run.steps ? run.step / run.steps : 0;
  bar.setAttribute("aria-label", byId("left").textContent);
  byId("tune-problem").textContent = translated(tuneProblem)
    || (isStopped && run.changed ? words("changed") : status === "failed" ? translated(run.problem) : "");
  byId("log").textContent = run.log.join("\n");
  byId("by-hand").textContent = run.by_hand.join("\n");
  byId("stop").disabled = stopping;
  drawCurve(byId("curve"), run.losses ?? [], run.steps ?? 1);
}

let stopping = false, tuneProblem = "", exportProblem = "";

async function command(path, body) {
  tuneProblem = exportProblem = "";
  try {
    run = await post(path, body);
    stopping = path === "/stop" && isRunning();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (path === "/export") exportProblem = error.message;
    else tuneProblem = error.message;
  }
  showTune();
  showExport();
}

async function allSaved() {
  await Promise.all(allEntries().map((one) => one.saving));
}

/** The loss against the step. */
function drawCurve(svg, points, steps) {
  const [left, right, top, bottom] = [44, 628, 12, 232];
  const most = Math.max(...points.map(([, loss]) => loss), 0.1);
  const x = (step) => left + (right - left) * step / Math.max(1, steps);
  const y = (loss) => bottom - (bottom - top) * loss / most;
  const make = (kind, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const parts = [0, 0.5, 1].flatMap((share) => [
    make("line", { class: "grid-line", x1: left, x2: right, y1: y(share * most), y2: y(share * most) }),
    make("text", { x: left - 8, y: y(share * most) + 4, "text-anchor": "end" }, (share * most).toFixed(most < 1 ? 2 : 1)),
  ]);
  if (points.length) {
    const line = points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`);
    const [first, last] = [points[0], points.at(-1)];
    parts.push(make("polygon", { class: "area", points: [`${x(first[0])},${bottom}`, ...line, `${x(last[0])},${bottom}`].join(" ") }));
    parts.push(make("polyline", { class: "loss", points: line.join(" ") }));
    parts.push(make("circle", { class: "now", cx: x(last[0]), cy: y(last[1]), r: 4.5 }));
    parts.push(make("text", { x: left, y: 252 }, "0"), make("text", { x: right, y: 252, "text-anchor": "end" }, steps));
  } else {
    parts.push(make("text", { x: (left + right) / 2, y: 128, "text-anchor": "middle" }, words("curve_empty")));
  }
  svg.setAttribute("aria-label", `${words("curve")}: ${points.length ? points.at(-1)[1].toFixed(2) : "–"}`);
  svg.replaceChildren(...parts);
}

// Before and after

function showResults() {
  byId("compare-empty").hidden = Boolean(results);
  byId("compared").hidden = !results;
  if (!results) return;
  const title = words(`outcome_${results.alike && results.outcome === "better" ? "alike" : results.outcome}`);
  byId("outcome").textContent = title;
  byId("outcome").className = results.outcome;
  const text = sentences(results.facts).replace(new RegExp(`^${title}:? `), "");
  byId("sentence").textContent = text[0].toUpperCase() + text.slice(1);
  byId("sets").replaceChildren(...results.sets.map(showBars));
  byId("samples").replaceChildren(...results.samples.map(showSample));
}

/** What a verdict states, each with its values, which may be such facts as well. */
function sentences(facts) {
  const sentence = ([key, ...values]) => fill(`fact_${key}`, ...values.map((one) => Array.isArray(one) ? sentence(one) : one));
  return facts.map(sentence).join(language === "zh" ? "" : " ");
}

function showBars(set) {
  const card = element("section", "", { className: "card" });
  const list = element("dl", "", { className: "bars" });
  card.append(element("h3", fill(set.right ? "right_of" : "agree_of", set.n)), list);
  for (const { name, value, interval } of set.bars) {
    const row = element("dt", "", { className: name });
    row.append(element("span", fill(`bar_${name}`, set.answer)), element("b", value === null ? "–" : value.toFixed(0)));
    const bar = element("dd", "", { className: name });
    const filled = element("i");
    filled.style.width = `${Math.min(100, value ?? 0)}%`;
    bar.append(filled);
    if (interval) {
      const range = element("s");
      range.style.left = `${Math.max(0, interval[0])}%`;
      range.style.width = `${Math.min(100, interval[1]) - Math.max(0, interval[0])}%`;
      bar.append(range);
    }
    list.append(row, bar);
  }
  if (results.sets.length > 1) card.append(element("p", sentences(set.facts), { className: "note" }));
  return card;
}

function showSample(one) {
  const card = element("article", "", { className: "card sample" });
  const text = element("div");
  const list = element("dl");
  const add = (label, answer, score) => {
    const said = element("dd");
    if (score !== undefined && (score === 0 || score === 1)) {
      said.append(element("span", score ? "✓" : "✗", { className: `tick ${score ? "yes" : "no"}` }));
    }
    said.append(answer || "–");
    list.append(element("dt", words(label)), said);
  };
  if (one.question) text.append(element("p", one.question));
  add("expected", one.answers.join(" / "));
  add("bar_start", one.start, one.start_score);
  add("bar_tuned", one.tuned, one.tuned_score);
  text.append(list);
  card.append(lazyPicture(one.images[0]), text);
  return card;
}

async function saveReport() {
  const blob = await (await send("v1/studio/report")).blob();
  const link = element("a", "", { href: URL.createObjectURL(blob), download: "report.html" });
  link.click();
}

// Try and export

let tried;

function showTried() {
  byId("try-image").hidden = !tried;
  byId("try-drop").classList.toggle("full", Boolean(tried));
  if (tried instanceof Blob) byId("try-image").src = URL.createObjectURL(tried);
  else if (tried) showPicture(byId("try-image"), tried, "large");
}

function showModels() {
  const names = Object.keys(project.models);
  const place = byId("tried");
  if ([...place.children].map((one) => one.dataset.model).join() === names.join()) return;
  place.replaceChildren(...names.map((name) => {
    const card = element("article", "", { className: "card model" });
    card.dataset.model = name;
    const title = element("h2", words(`bar_${name}`));
    title.append(element("small", project.models[name]));
    card.append(title, element("p", words("no_answer_yet"), { className: "answer empty" }), element("p", "", { className: "note state" }));
    return card;
  }));
}

async function tryModels() {
  const question = byId("try-question").value;
  byId("try-problem").textContent = tried ? "" : words("try_incomplete");
  if (!tried) return;
  byId("ask").disabled = true;
  try {
    const url = await dataUrl(tried);
    await Promise.all([...byId("tried").children].map(async (card) => {
      card.classList.add("busy");
      try {
        const made = await askModel(card.dataset.model, url, question);
        card.querySelector(".answer").classList.remove("empty");
        card.querySelector(".answer").textContent = made.text || "–";
        card.querySelector(".state").textContent = sureness(made);
      } finally {
        card.classList.remove("busy");
      }
    }));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    byId("try-problem").textContent = translated(error.message);
  } finally {
    byId("ask").disabled = false;
  }
}

function showExport() {
  const isBusy = run.busy === "export";
  byId("export").disabled = Boolean(run.busy) || !results || Boolean(run.model);
  byId("export").textContent = words(isBusy ? "exporting" : "export");
  byId("exported").textContent = run.model && !isBusy ? fill("exported", run.model) : "";
  byId("export-problem").textContent = translated(exportProblem || (run.status !== "failed" && !run.model ? run.problem : ""));
}

// The whole page

function showTab(name) {
  for (const one of ["label", "tune", "compare", "try"]) {
    byId(`${one}-panel`).hidden = one !== name;
    byId(`${one}-tab`).setAttribute("aria-selected", String(one === name));
  }
  sessionStorage.setItem("instructblip-tab", name);
  if (name !== "label") entry?.save();
  showUnsaved();
  if (name === "try" && !tried && selected) {
    tried = selected;
    byId("try-question").value = entry?.question ?? "";
    showTried();
  }
}

function showAll() {
  translate(document);
  document.documentElement.lang = language;
  const name = project.folder.split("/").at(-1);
  byId("folder").textContent = name;
  document.title = `${name} – ${words("title")}`;
  showGrid();
  showEditor();
  showTune();
  showResults();
  showModels();
  showExport();
}

/** Shows the picture of that name if it is still there, else one without an answer. */
function openOne(name) {
  const names = project.images.map((one) => one.name);
  const open = names.includes(name) ? name : names.find((one) => !isAnswered(one)) ?? names[0];
  if (open) return select(open);
  entry = selected = undefined;
  showEditor();
}

/** Reads the run again, and the folder unless it is to be left out. */
async function refresh(withFolder = true) {
  const [before, since] = [run, writes];
  [project, run] = await Promise.all([withFolder ? get("") : project, get("/run")]);
  const isNews = run.folder !== before?.folder || run.status !== before?.status;
  if (isNews && (run.status === "finished" || !before || results)) results = await get("/results");
  if (!isRunning()) stopping = false;
  if (withFolder) {
    if (since === writes) takeRows();
    showGrid();
  }
  if (entry && !entry.isDraft && !entry.saving) {
    if (!rowsOf(selected).includes(entry)) openOne(selected);
    else if (document.activeElement !== byId("answer") && document.activeElement !== byId("question")) showEditor();
  }
  showTune();
  if (isNews) showResults();
  showModels();
  showExport();
  if (before && before.status === "running" && !isRunning() && entry && !suggestion) suggestSoon();
}

/** What keeps the page from reading the folder. */
function showBanner(error) {
  if (!(error instanceof Refused)) throw error;
  byId("banner").textContent = translated(error.message);
  byId("banner").hidden = false;
}

async function poll() {
  for (let turn = 1; ; turn += 1) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (uploading || document.hidden) continue;
    try {
      const isDown = !byId("banner").hidden;
      await refresh(project.scanning || isDown || turn % FOLDER_TURNS === 0);
      byId("banner").hidden = true;
      for (const one of allEntries()) if (one.problem && one.isOffline) one.save();
    } catch (error) {
      showBanner(error);
    }
  }
}

/** The token of the address, which leaves the address bar. */
function takeToken() {
  const [, token] = location.hash.split("#token=");
  if (!token) return;
  sessionStorage.setItem(STORED_KEY, token);
  history.replaceState(null, "", location.pathname);
  byId("key").value = token;
  if (byId("key-dialog").open) byId("key-form").requestSubmit();
}

function listen() {
  for (const name of ["label", "tune", "compare", "try"]) byId(`${name}-tab`).onclick = () => showTab(name);
  byId("language").onclick = () => {
    language = language === "zh" ? "en" : "zh";
    byId("tried").replaceChildren();
    showAll();
  };
  byId("files").onchange = () => {
    addFiles([...byId("files").files]);
    byId("files").value = "";
  };
  byId("empty").onclick = () => byId("files").click();
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", kind === "dragover" && !byId("label-panel").hidden);
      if (kind !== "drop") return;
      if (byId("try-panel").hidden) addFiles([...event.dataTransfer.files]);
      else if (event.dataTransfer.files[0]) [tried] = event.dataTransfer.files, showTried();
    });
  }
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length && byId("try-panel").hidden) addFiles(files);
  });
  byId("grid").onkeydown = moveInGrid;
  for (const id of ["question", "answer"]) byId(id).oninput = typed;
  byId("question").onchange = () => {
    showEarlier();
    suggestSoon();
  };
  byId("question").onkeydown = (event) => {
    if (event.key === "Enter" && !event.isComposing) byId("answer").focus();
  };
  byId("answer").onkeydown = answerKey;
  byId("editor").onkeydown = (event) => {
    if (event.key === "Escape") tiles.get(selected)?.focus();
  };
  byId("keep-mine").onclick = () => entry.settle(true);
  byId("keep-theirs").onclick = () => entry.settle(false);
  byId("take").onclick = take;
  byId("suggest").onclick = suggest;
  byId("tune").onclick = () => allSaved().then(() => command("/tune"));
  byId("resume").onclick = () => command("/tune", { resume: true });
  byId("stop").onclick = () => command("/stop");
  byId("to-compare").onclick = () => showTab("compare");
  byId("report").onclick = saveReport;
  byId("try-file").onchange = () => {
    [tried = tried] = byId("try-file").files;
    byId("try-file").value = "";
    showTried();
  };
  byId("try-form").onsubmit = (event) => {
    event.preventDefault();
    tryModels();
  };
  byId("export").onclick = () => command("/export");
  window.onhashchange = takeToken;
}

async function begin() {
  page = await (await fetch("studio/studio.json")).json();
  language = navigator.language.startsWith("zh") ? "zh" : "en";
  translate(document);
  takeToken();
  listen();
  while (!project) {
    await refresh().catch(showBanner);
    if (!project) await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  byId("banner").hidden = true;
  const draft = restoreUnsaved();
  if (draft) pick(draft, true);
  else openOne();
  keepUnsaved();
  showAll();
  showTab(sessionStorage.getItem("instructblip-tab") ?? "label");
  document.body.dataset.ready = "yes";
  poll();
}

begin();
