// What the pages share: their texts, and requests to the server. Whatever a person, a model or a file
// says becomes text, never HTML.
"use strict";

const byId = (id) => document.getElementById(id);
const STORED_KEY = "instructblip-key";
let page, language;

// Texts

function words(key) {
  return page.labels[key][language === "zh" ? 1 : 0];
}

function translate(root) {
  for (const one of root.querySelectorAll("[data-text]")) one.textContent = words(one.dataset.text);
}

function element(kind, text = "", properties = {}) {
  const made = Object.assign(document.createElement(kind), properties);
  made.textContent = text;
  return made;
}

function fromTemplate(id) {
  const made = byId(id).content.cloneNode(true);
  translate(made);
  return made;
}

// The server

/** What the server refused; `status` is 0 where it does not answer. */
class Refused extends Error {
  constructor(message, status = 0, answer = null) {
    super(message);
    Object.assign(this, { status, answer });
  }
}

/** The response to a request, whose body is JSON or a file. Asks for a key where the server wants one. */
async function send(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(STORED_KEY);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const options = { headers, signal };
    if (body) {
      options.method = "POST";
      options.body = body instanceof Blob ? body : JSON.stringify(body);
      headers["Content-Type"] = body instanceof Blob ? "application/octet-stream" : "application/json";
    }
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(words("no_server"));
    }
    if (response.status === 401) {
      await askForKey(key);
      continue;
    }
    if (response.ok) return response;
    const answer = await response.json().catch(() => null);
    const message = answer?.error?.message ?? `${response.status} ${response.statusText}`;
    throw new Refused(message, response.status, answer);
  }
}

let asked;

/** Resolves when there is a key that differs from `wrong`; of several callers all wait for one. */
function askForKey(wrong) {
  if (sessionStorage.getItem(STORED_KEY) !== wrong) return Promise.resolve();
  asked ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key").value = "";
    dialog.querySelector(".problem").textContent = wrong ? words("key_wrong") : "";
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      // of an address, its token
      sessionStorage.setItem(STORED_KEY, byId("key").value.trim().replace(/^.*#token=/, ""));
      dialog.close();
      asked = undefined;
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
    dialog.showModal();
  });
  return asked;
}
