// A model of `release/onnx.py` in a browser: tokenizers, images, greedy answers.
"use strict";

// --- tokenizers: byte-level BPE and WordPiece, as tokenizer.json describes them -----------------

const lower = (text) => Array.from(text, (c) => c.toLowerCase()).join(""); // a letter at a time

function byteLevelBpe(file) {
  const letters = {}, bytes = {}; // each byte has a printable letter
  const plain = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
  for (let b = 0, extra = 256; b < 256; b++) {
    letters[b] = String.fromCodePoint(plain(b) ? b : extra++);
    bytes[letters[b]] = b;
  }
  const vocab = file.model.vocab, ranks = new Map();
  file.model.merges.forEach((pair, rank) => {
    ranks.set(Array.isArray(pair) ? pair.join(" ") : pair, rank);
  });
  const pieces =
    /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
  const special = new Set(file.added_tokens.map((token) => token.id));
  const words = Object.fromEntries(Object.entries(vocab).map(([token, id]) => [id, token]));
  return {
    encode(text) {
      if (file.normalizer) text = lower(text);
      if (file.pre_tokenizer.add_prefix_space && text && !text.startsWith(" ")) text = " " + text;
      const ids = [];
      for (const [piece] of text.matchAll(pieces)) {
        let parts = Array.from(new TextEncoder().encode(piece), (b) => letters[b]);
        for (;;) {
          let best = Infinity, at = -1;
          for (let i = 0; i + 1 < parts.length; i++) {
            const rank = ranks.get(parts[i] + " " + parts[i + 1]);
            if (rank < best) [best, at] = [rank, i];
          }
          if (at < 0) break;
          parts.splice(at, 2, parts[at] + parts[at + 1]);
        }
        for (const part of parts) if (part in vocab) ids.push(vocab[part]);
      }
      return ids;
    },
    decode(ids) {
      const tokens = ids.filter((id) => !special.has(id) && id in words).map((id) => words[id]);
      return new TextDecoder().decode(Uint8Array.from(tokens.join(""), (c) => bytes[c])).trim();
    },
  };
}

function wordPiece(file) {
  const { vocab, unk_token: unknown, continuing_subword_prefix: inner } = file.model;
  const rules = file.normalizer;
  const accents = rules.strip_accents ?? rules.lowercase;
  const chinese =
    /[\u4E00-\u9FFF\u3400-\u4DBF\u{20000}-\u{2A6DF}\u{2A700}-\u{2B73F}\u{2B740}-\u{2B81F}\u{2B920}-\u{2CEAF}\uF900-\uFAFF\u{2F800}-\u{2FA1F}]/gu;
  return {
    encode(text) {
      if (rules.clean_text) {
        text = text.replace(/(?![\t\n\r])[\0\uFFFD\p{Cc}\p{Cf}\p{Cn}\p{Co}]/gu, "");
        text = text.replace(/\p{White_Space}/gu, " ");
      }
      if (rules.handle_chinese_chars) text = text.replace(chinese, " $& ");
      if (accents) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
      if (rules.lowercase) text = lower(text);
      const ids = [];
      for (const [word] of text.matchAll(/[!-/:-@[-`{-~\p{P}]|[^\p{White_Space}!-/:-@[-`{-~\p{P}]+/gu)) {
        const letters = Array.from(word), found = [];
        let start = 0;
        while (start < letters.length && letters.length <= file.model.max_input_chars_per_word) {
          let end = letters.length, id;
          for (; end > start; end--) {
            id = vocab[(start ? inner : "") + letters.slice(start, end).join("")];
            if (id !== undefined) break;
          }
          if (id === undefined) break;
          found.push(id);
          start = end;
        }
        ids.push(...(start === letters.length ? found : [vocab[unknown]]));
      }
      return ids;
    },
  };
}

const tokenizer = (file) => (file.model.type === "BPE" ? byteLevelBpe : wordPiece)(file);

const roomOf = ({ prefix, suffix, longest }) => Math.max(1, longest - prefix.length - suffix.length);

// The ids of a text between special tokens; a long text is truncated at its beginning.
function idsOf(encode, text, layout) {
  return [...layout.prefix, ...encode(text).slice(-roomOf(layout)), ...layout.suffix];
}

// --- images: what Pillow's resize computes, value by value --------------------------------------

const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
};
const ONE = 2 ** 22; // weights are whole numbers of this fraction

function weightsOf(size, target, [reach, filter]) {
  const scale = size / target, spread = Math.max(1, scale), support = reach * spread;
  return Array.from({ length: target }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(size, Math.trunc(center + support + 0.5));
    const weights = [];
    let sum = 0;
    for (let x = first; x < end; x++) {
      weights.push(filter((x - center + 0.5) * (1 / spread)));
      sum += weights.at(-1);
    }
    const whole = weights.map((w) => (w / sum) * ONE).map((w) => Math.trunc(w + (w < 0 ? -0.5 : 0.5)));
    return [first, whole];
  });
}

// Rows of RGB values resized along x and turned, so that a second call resizes along y.
function resizeAndTurn(values, width, height, target, filter) {
  const out = new Uint8ClampedArray(target * height * 3);
  weightsOf(width, target, filter).forEach(([first, weights], x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = ONE / 2;
        for (let i = 0; i < weights.length; i++) {
          sum += weights[i] * values[(y * width + first + i) * 3 + c];
        }
        out[(x * height + y) * 3 + c] = Math.floor(sum / ONE);
      }
    }
  });
  return out;
}

// RGB values -> Float32Array [3, S, S].
function pixelValues(rgb, width, height, { size, mean, std, resample }) {
  const turned = resizeAndTurn(rgb, width, height, size, FILTERS[resample]);
  const small = resizeAndTurn(turned, height, size, size, FILTERS[resample]);
  const f = Math.fround, out = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < size * size; i++) {
      const centred = f(f(f(small[i * 3 + c]) / f(255)) - f(mean[c]));
      out[c * size * size + i] = centred / f(std[c]);
    }
  }
  return out;
}

// Python's round: halves go to the even number.
function roundEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

// The part of an image that is read: [left, top, width, height].
function seen(width, height, { crop_pct }) {
  if (crop_pct == null) return [0, 0, width, height];
  const side = Math.max(1, roundEven(crop_pct * Math.min(width, height)));
  return [Math.floor((width - side) / 2), Math.floor((height - side) / 2), side, side];
}

// --- answers ------------------------------------------------------------------------------------

class Model {
  // `sessions` are onnxruntime's of the three graphs, `files` the three JSON files.
  constructor(ort, sessions, files) {
    Object.assign(this, { ort, sessions, settings: files.settings });
    this.words = tokenizer(files.language);
    this.reads = files.qformer && tokenizer(files.qformer);
  }

  ids(list) {
    return new this.ort.Tensor("int64", BigInt64Array.from(list, BigInt), [1, list.length]);
  }

  // Whether a part of the model does not read all of a text.
  truncates(text) {
    const { instruction_aware: aware, instruction, prompt } = this.settings;
    const longer = (tokens, layout) => tokens.encode(text).length > roomOf(layout);
    return longer(this.words, prompt) || (aware && longer(this.reads, instruction));
  }

  async see(rgb, width, height) {
    const { size } = this.settings.image;
    const values = pixelValues(rgb, width, height, this.settings.image);
    const pixels = new this.ort.Tensor("float32", values, [1, 3, size, size]);
    return (await this.sessions.image.run({ pixel_values: pixels })).features;
  }

  async answer(features, text, onText = () => {}) {
    const { Tensor } = this.ort, s = this.settings;
    const reads = { features };
    if (s.instruction_aware) {
      reads.qformer_ids = this.ids(idsOf(this.reads.encode, text, s.instruction));
    }
    let { queries } = await this.sessions.queries.run(reads);
    let ids = idsOf(this.words.encode, text, s.prompt);
    const cache = {};
    s.cache.forEach((pair, i) => pair.forEach(([one, heads, , width], j) => {
      cache[`${["key", "value"][j]}_${i}`] = new Tensor("float32", [], [one, heads, 0, width]);
    }));
    const given = [];
    while (given.length < s.max_new_tokens) {
      const inputs = { queries, ids: this.ids(ids) };
      for (const name in cache) inputs[`past_${name}`] = cache[name];
      const { logits, ...next } = await this.sessions.language.run(inputs);
      Object.assign(cache, next);
      const scores = Float32Array.from(logits.data), penalty = s.repetition_penalty;
      for (const id of new Set(given)) scores[id] *= scores[id] < 0 ? penalty : 1 / penalty;
      if (given.length < s.min_new_tokens) for (const id of s.ends) scores[id] = -Infinity;
      const token = scores.reduce((best, score, i) => (score > scores[best] ? i : best), 0);
      if (s.ends.includes(token)) break;
      given.push(token);
      onText(this.words.decode(given));
      ids = [token];
      queries = new Tensor("float32", [], [1, 0, queries.dims[2]]);
    }
    return this.words.decode(given);
  }
}

if (typeof module !== "undefined") {
  module.exports = { tokenizer, idsOf, pixelValues, seen, Model };
}
