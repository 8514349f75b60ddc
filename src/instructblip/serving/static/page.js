// The page: a client of the server's own interface. Whatever a person, a model or a file says becomes
// text, never HTML.
"use strict";

const MOST_ROWS = 50;
let models, inProgress;

function setLanguage(name) {
  language = name;
  document.documentElement.lang = name;
  translate(document);
  document.title = words("title");
  for (const drop of Object.values(drops)) drop.show();
  for (const one of cards) one.show();
}

// The server

/** The data of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Images: chosen, dropped, pasted or an example

class Drop {
  constructor(place) {
    this.place = place;
    place.append(fromTemplate("drop-template"));
    this.image = place.querySelector("img");
    this.input = place.querySelector("input");
    this.remove = place.querySelector("button");
    this.url = this.name = "";
    this.input.onchange = () => this.read(this.input.files[0]);
    this.remove.onclick = () => this.set("", "");
    for (const kind of ["dragover", "dragleave", "drop"]) {
      place.addEventListener(kind, (event) => {
        event.preventDefault();
        place.classList.toggle("over", kind === "dragover");
        if (kind === "drop") this.read(event.dataTransfer.files[0]);
      });
    }
  }

  read(file) {
    if (!file) return;
    const reader = new FileReader();
    reader.onload = () => this.set(reader.result, file.name);
    reader.readAsDataURL(file);
  }

  set(url, name) {
    this.url = url;
    this.name = name;
    this.input.value = "";
    this.show();
  }

  show() {
    this.image.hidden = this.remove.hidden = !this.url;
    if (this.url) this.image.src = this.url;
    else this.image.removeAttribute("src");
    this.image.alt = this.name;
    this.place.classList.toggle("full", Boolean(this.url));
    this.place.querySelector(".file span").textContent = this.name;
  }
}

const drops = {};

// Maps

/** Draws the part of the image that the model reads, bright where the weights [row][column] are. */
function drawMap(canvas, image, seen, weights) {
  const context = canvas.getContext("2d");
  const [left, top] = [seen[0] * image.naturalWidth, seen[1] * image.naturalHeight];
  const [w, h] = [seen[2] * image.naturalWidth - left, seen[3] * image.naturalHeight - top];
  const scale = Math.min(canvas.width / w, canvas.height / h);
  const [x, y] = [(canvas.width - w * scale) / 2, (canvas.height - h * scale) / 2];
  const most = Math.max(...weights.flat(), 1e-9);
  const layer = (color, alpha) => {
    const small = new OffscreenCanvas(weights[0].length, weights.length);
    const pixels = new ImageData(small.width, small.height);
    weights.flat().forEach((weight, at) => {
      pixels.data.set([...color, 255 * alpha(Math.max(weight, 0) / most)], 4 * at);
    });
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.drawImage(small, x, y, w * scale, h * scale);
  };
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, left, top, w, h, x, y, w * scale, h * scale);
  layer([0, 0, 0], (weight) => 0.75 * (1 - weight));
  context.globalCompositeOperation = "lighter";
  layer([255, 144, 0], (weight) => 0.25 * weight);
  context.globalCompositeOperation = "source-over";
}

// A model: its answer, the ranking of the candidates, and the maps of its words

const cards = [];

class ModelCard {
  constructor(model) {
    this.model = model;
    const made = fromTemplate("model-template");
    this.place = made.querySelector("article");
    this.place.id = `model-${model.id}`;
    const title = made.querySelector("h2");
    title.textContent = model.title;
    if (model.title !== model.id) title.append(element("small", model.id));
    this.answer = made.querySelector(".answer");
    this.state = made.querySelector(".state");
    this.canvas = made.querySelector(".look canvas");
    this.caption = made.querySelector("figcaption");
    this.list = made.querySelector("ol");
    this.why = made.querySelector(".why");
    this.why.onclick = () => this.explain();
    this.words = made.querySelector(".words");
    this.measured = made.querySelector(".measured");
    byId("models").append(made);
    this.text = null;
  }

  /** Rows for the candidates, without figures unless they are ranked. */
  showCandidates(texts, ranked) {
    const best = ranked && Math.max(...ranked.map((one) => one.probability));
    const rows = texts.map((text, at) => ({ text, probability: ranked?.[at].probability }));
    if (ranked) rows.sort((a, b) => b.probability - a.probability);
    this.list.replaceChildren(...rows.map(({ text, probability }) => {
      const row = element("li");
      const percent = ranked ? `${Math.round(100 * probability)}%` : "–";
      if (ranked && probability === best) row.className = "best";
      row.append(element("span", text, { title: text }), element("output", percent));
      row.append(element("progress", "", { max: 1, value: probability ?? 0 }));
      return row;
    }));
    if (!rows.length) this.list.append(element("li", words("ranking_empty")));
  }

  show() {
    this.answer.classList.toggle("empty", !this.text);
    this.answer.textContent = this.text || words(this.text === null ? "answer_empty" : "answering");
    this.why.disabled = !this.asked || Boolean(this.reasons);
    this.showMap();
  }

  /** The map of the chosen word, or of the whole answer; the image alone before it is explained. */
  showMap() {
    const reasons = this.reasons;
    this.caption.textContent = words(reasons ? "reason_shown" : "reason_empty");
    this.measured.textContent = "";
    if (!reasons) {
      this.words.replaceChildren();
      this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
      return;
    }
    const [low, high] = page.measured.interval;
    const figures = { ...page.measured, low, high };
    this.measured.textContent = words("measured").replace(/{(\w+)}/g, (_, name) => figures[name]);
    const maps = [reasons.images[0].whole, ...reasons.images[0].words];
    drawMap(this.canvas, this.image, reasons.seen[0], maps[this.chosen]);
    this.words.replaceChildren(...[words("whole"), ...reasons.words].map((text, at) => {
      const button = element("button", text, { type: "button" });
      button.setAttribute("aria-pressed", String(at === this.chosen));
      button.onclick = () => {
        this.chosen = at;
        this.showMap();
        this.words.children[at].focus();
      };
      return button;
    }));
  }

  async explain() {
    const asked = this.asked;
    const { url, instruction, text } = asked;
    const body = { model: this.model.id, images: [url], instruction, answer: text };
    this.why.disabled = true;
    this.place.classList.add("busy");
    try {
      const reasons = await (await send("v1/explain", body)).json();
      if (this.asked !== asked) return; // another question has been asked meanwhile
      [this.reasons, this.chosen] = [reasons, 0];
      this.showMap();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (this.asked === asked) this.measured.textContent = error.message;
    } finally {
      if (this.asked === asked) {
        this.place.classList.remove("busy");
        this.why.disabled = Boolean(this.reasons);
      }
    }
  }

  async ask(url, image, instruction, candidates, signal) {
    this.text = "";
    this.state.textContent = "";
    [this.image, this.reasons, this.asked] = [image, null, null];
    this.place.classList.add("busy");
    this.show();
    this.showCandidates(candidates);
    const began = performance.now();
    try {
      await Promise.all([
        this.stream(url, instruction, signal).then((text) => {
          if (text) this.asked = { url, instruction, text };
          const seconds = ((performance.now() - began) / 1000).toFixed(1);
          this.state.textContent = [`${seconds} s`, ...this.notes].join(" · ");
        }),
        candidates.length && this.rank(url, instruction, candidates, signal),
      ]);
    } finally {
      this.place.classList.remove("busy");
    }
    return this.text;
  }

  async stream(url, instruction, signal) {
    const content = [
      { type: "image_url", image_url: { url } },
      { type: "text", text: instruction },
    ];
    const response = await send("v1/chat/completions", {
      model: this.model.id,
      messages: [{ role: "user", content }],
      logprobs: true,
      stream: true,
      stream_options: { include_usage: true },
    }, signal);
    this.notes = [];
    for await (const event of events(response)) {
      if (event.error) throw new Refused(event.error.message);
      this.text += event.choices[0]?.delta.content ?? "";
      if (this.text) this.show();
      const known = event.choices[0]?.logprobs;
      if (typeof known?.confidence === "number") {
        this.notes.push(words("confidence").replace("{percent}", Math.round(100 * known.confidence)));
      }
      // At least half as likely about other images as about this one.
      if (typeof known?.blind_log_likelihood === "number" &&
          known.blind_log_likelihood > known.log_likelihood - Math.LN2) {
        this.notes.push(words("blind"));
      }
      if (event.usage?.prompt_tokens_lost) this.notes.push(words("lost"));
    }
    const answer = this.text;
    this.text ||= "–";
    this.show();
    return answer;
  }

  async rank(url, instruction, candidates, signal) {
    const body = { model: this.model.id, images: [url], instruction, candidates };
    const answer = await (await send("v1/rank", body, signal)).json();
    this.showCandidates(candidates, answer.candidates);
  }
}

// The two forms

function readCandidates() {
  const parts = byId("candidates").value.split(/[,，、]/).map((part) => part.trim());
  return [...new Set(parts.filter(Boolean))];
}

/** Runs `work(signal)` with the form's button as its end; what is refused is shown below it. */
async function run(form, label, work) {
  if (inProgress) {
    inProgress.abort();
    return;
  }
  const button = form.querySelector(".primary");
  const problem = form.querySelector(".problem");
  inProgress = new AbortController();
  problem.textContent = "";
  button.classList.add("busy");
  button.dataset.text = "stop";
  button.textContent = words("stop");
  try {
    await work(inProgress.signal);
  } catch (error) {
    if (!(error instanceof Refused) && error.name !== "AbortError") throw error;
    problem.textContent = error instanceof Refused ? error.message : words("stopped");
  } finally {
    inProgress.abort(); // what still runs of this
    inProgress = undefined;
    button.classList.remove("busy");
    button.dataset.text = label;
    button.textContent = words(label);
  }
}

function ask() {
  return run(byId("ask-form"), "ask", async (signal) => {
    const [url, instruction] = [drops.ask.url, byId("instruction").value.trim()];
    if (!url || !instruction) throw new Refused(words("incomplete"));
    const image = new Image();
    image.src = url;
    await image.decode().catch(() => {
      throw new Refused(words("no_image"));
    });
    const candidates = readCandidates();
    if (matchMedia("(max-width: 820px)").matches) byId("models").scrollIntoView();
    const all = cards.map((card) => card.ask(url, image, instruction, candidates, signal));
    try {
      remember(url, instruction, await Promise.all(all));
    } finally {
      for (const card of cards) {
        card.text ||= null;
        card.show();
      }
    }
  });
}

function remember(url, instruction, answers) {
  const body = byId("history").querySelector("tbody");
  const row = element("tr");
  const cell = element("td");
  cell.append(element("img", "", { src: url, alt: "" }));
  row.append(cell, element("td", instruction), ...answers.map((text) => element("td", text)));
  body.prepend(row);
  if (body.children.length > MOST_ROWS) body.lastChild.remove();
  byId("history").querySelector(".note").hidden = true;
}

function draw() {
  return run(byId("draw-form"), "draw", async (signal) => {
    const count = Number(byId("how-many").value);
    showDrawn(count);
    byId("drawn").classList.add("busy");
    try {
      const seed = byId("seed").value;
      const response = await send("v1/images/generations", {
        prompt: byId("what").value,
        n: count,
        guidance: Number(byId("guidance").value),
        seed: seed === "" ? null : Number(seed),
        image: drops.draw.url || null,
      }, signal);
      const answer = await response.json();
      byId("drawn").replaceChildren(...answer.data.map((one, at) => {
        const url = `data:image/png;base64,${one.b64_json}`;
        const link = element("a", "", { href: url, download: `drawn-${at + 1}.png` });
        link.append(element("img", "", { src: url, alt: byId("what").value }));
        return link;
      }));
    } finally {
      byId("drawn").classList.remove("busy");
    }
  });
}

/** Places for the images that are drawn. */
function showDrawn(count) {
  byId("drawn").replaceChildren(...Array.from({ length: count }, () => element("div")));
}

function showTab(name) {
  for (const one of ["ask", "draw"]) {
    byId(`${one}-panel`).hidden = one !== name;
    byId(`${one}-tab`).setAttribute("aria-selected", String(one === name));
  }
}

function offer(place, texts, into) {
  place.replaceChildren(...texts.map((text) => {
    const button = element("button", text, { type: "button" });
    button.onclick = () => {
      into.value = text;
      into.dispatchEvent(new Event("input"));
    };
    return button;
  }));
}

function showExamples() {
  const place = byId("examples");
  place.hidden = !page.examples.length;
  place.replaceChildren(...page.examples.map((example) => {
    const button = element("button", "", { type: "button", title: example.instruction });
    button.append(element("img", "", { src: example.image, alt: example.instruction }));
    button.onclick = () => {
      drops.ask.set(example.image, "");
      byId("instruction").value = example.instruction;
      byId("candidates").value = example.candidates;
      for (const card of cards) card.showCandidates(readCandidates());
    };
    return button;
  }));
}

async function begin() {
  page = await (await fetch("page/page.json")).json();
  language = navigator.language.startsWith("zh") ? "zh" : "en";
  translate(document);
  drops.ask = new Drop(byId("picture"));
  drops.draw = new Drop(byId("subject"));
  setLanguage(language);
  byId("language").onclick = () => setLanguage(language === "zh" ? "en" : "zh");
  models = (await (await send("v1/models")).json()).data;
  for (const model of models) {
    const card = new ModelCard(model);
    cards.push(card);
    card.show();
    card.showCandidates([]);
    byId("history").querySelector("thead tr").append(element("th", model.title));
  }
  showExamples();
  offer(byId("instructions"), page.instructions, byId("instruction"));
  offer(byId("drawings"), page.drawings, byId("what"));
  byId("instruction").value = page.instructions[0];
  byId("what").value = page.drawings[0];
  byId("tabs").hidden = !models.some((model) => model.draws);
  for (const name of ["ask", "draw"]) byId(`${name}-tab`).onclick = () => showTab(name);
  for (const slider of document.querySelectorAll(".slider")) {
    const [input, output] = [slider.querySelector("input"), slider.querySelector("output")];
    (input.oninput = () => { output.textContent = input.value; })();
  }
  byId("how-many").addEventListener("input", () => inProgress || showDrawn(byId("how-many").value));
  showDrawn(Number(byId("how-many").value));
  byId("candidates").oninput = () => {
    for (const card of cards) card.showCandidates(readCandidates());
  };
  for (const [form, work] of [[byId("ask-form"), ask], [byId("draw-form"), draw]]) {
    form.onsubmit = (event) => {
      event.preventDefault();
      work();
    };
    form.querySelector("textarea").onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    };
  }
  document.addEventListener("paste", (event) => {
    const drop = byId("draw-panel").hidden ? drops.ask : drops.draw;
    drop.read([...event.clipboardData.files].find((file) => file.type.startsWith("image/")));
  });
  for (const kind of ["dragover", "drop"]) {
    document.addEventListener(kind, (event) => event.preventDefault());
  }
  document.body.dataset.ready = "yes";
}

begin();
