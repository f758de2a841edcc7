/* The model in the page: a next-token explorer, a tokenizer view, a chat with two models, an attention view.
 *
 * Each shows stored runs at once (`#stored`, from book/stored.json). The model is fetched on a click, in parts that the
 * browser keeps, and runs in the page by llama.cpp in WebAssembly; from a folder (file:) no browser lets it run, and the
 * stored runs stand in. All text goes in as text, never as HTML.
 */
"use strict";
(() => {
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  const stored = JSON.parse(document.getElementById("stored").textContent);
  const models = stored.models || {};
  const CACHE = "gpt-at-work-models";
  const SHOWN = 12;
  const canRun = location.protocol !== "file:" && Boolean(models.base) && typeof WebAssembly === "object";

  /* Small helpers for the page */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
  const megabytes = (bytes) => `${Math.round(bytes / 1e6)} MB`;
  const visible = (token) => token.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
  let numbers = 0;
  const id = (name) => `try-${name}-${++numbers}`;
  function later(delay, action) {
    let timer;
    return () => { clearTimeout(timer); timer = setTimeout(action, delay); };
  }
  function field(label, control) {
    control.id = control.id || id("field");
    return make("div", { class: "try-field" }, make("label", { for: control.id }, label), control);
  }
  function slider(label, settings, changed) {
    const output = make("output", {}, settings.value);
    const input = make("input", { type: "range", ...settings });
    input.addEventListener("input", () => { output.textContent = input.value; changed(); });
    input.id = id("slider");
    const element = make("div", { class: "try-field" }, make("label", { for: input.id }, `${label} `, output), input);
    return { element, get value() { return Number(input.value); } };
  }

  /* The engines: one for each model, loaded once for all components of the page */
  const engines = {};
  const listeners = [];
  function tell(failure) { listeners.forEach((listener) => listener(failure)); }

  async function part(cache, name, version, progress) {
    const address = `${here}model/${name}?${version}`;
    const kept = cache && (await cache.match(address));
    if (kept) {
      const blob = await kept.blob();
      progress(blob.size);
      return blob;
    }
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`${name} is not beside the book (${answer.status})`);
    const pieces = [];
    const reader = answer.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      progress(value.length);
    }
    const blob = new Blob(pieces);
    if (cache) await cache.put(address, new Response(blob)).catch(() => {});
    return blob;
  }

  async function start(name, engine) {
    const entry = models[name];
    const cache = "caches" in window ? await caches.open(CACHE).catch(() => null) : null;
    const parts = [];
    for (const one of entry.parts) {
      parts.push(await part(cache, one, entry.version, (bytes) => { engine.got += bytes; tell(); }));
    }
    if (cache) {
      for (const request of await cache.keys()) {
        const [file, version] = request.url.split("/").pop().split("?");
        if (file.startsWith(`${name}-`) && version !== entry.version) await cache.delete(request);
      }
    }
    const { Wllama } = await import(`${here}model/wllama.js`);
    const quiet = { debug() {}, log() {}, warn() {}, error() {} };
    const wllama = new Wllama({ "single-thread/wllama.wasm": `${here}model/wllama.wasm` }, { logger: quiet });
    engine.file = new Blob(parts);
    await wllama.loadModel([engine.file], { n_ctx: 2048, n_threads: 1 });
    return wllama;
  }

  function load(name) {
    if (!engines[name]) {
      const engine = (engines[name] = { state: "loading", got: 0, queue: Promise.resolve() });
      engine.ready = start(name, engine).then(
        (wllama) => { engine.wllama = wllama; engine.state = "ready"; tell(); return engine; },
        (error) => { delete engines[name]; engine.state = "failed"; tell({ name, error }); throw error; },
      );
    }
    return engines[name].ready;
  }
  const runs = (name) => engines[name]?.state === "ready";

  /* What an engine does goes one after the other. */
  function within(name, work) {
    const engine = engines[name];
    const result = engine.queue.then(() => work(engine.wllama));
    engine.queue = result.catch(() => {});
    return result;
  }
  const decoder = new TextDecoder();
  const text = (bytes) => decoder.decode(bytes);
  const pieces = (name, words) =>
    within(name, async (wllama) => {
      const found = [];
      for (const token of await wllama.tokenize(words, true)) found.push(text(await wllama.detokenize([token])));
      return found;
    });
  const probabilities = (words) =>
    within("base", async (wllama) => {
      const tokens = await wllama.tokenize(words, true);
      await wllama.kvClear();
      await wllama.decode(tokens.slice(-2000), {});
      const all = await wllama.getLogits(-1);
      const likely = [];
      for (const one of all.slice(0, SHOWN)) {
        likely.push([text(await wllama.detokenize([one.token])), Math.log(one.p)]);
      }
      return { tokens: likely, all: all.filter((one) => one.p > 0).map((one) => Math.log(one.p)) };
    });
  const SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
  const reply = (name, messages, onText, signal) =>
    within(name, async (wllama) => {
      const turns = [{ role: "system", content: SYSTEM }, ...messages];
      const prompt = turns.map((turn) => `<|im_start|>${turn.role}\n${turn.content}<|im_end|>\n`).join("");
      let tokens = 0;
      let began = 0;
      await wllama.kvClear();
      const answer = await wllama.createCompletion(`${prompt}<|im_start|>assistant\n`, {
        nPredict: 160,
        sampling: { temp: 0 },
        abortSignal: signal,
        onNewToken: (token, piece, so_far) => {
          began = began || performance.now();
          tokens += 1;
          onText(so_far);
        },
      });
      const seconds = (performance.now() - began) / 1000;
      return { answer, speed: tokens > 1 ? (tokens - 1) / seconds : 0 };
    });

  /* The bar that offers to load a model */
  function bar(name, title) {
    const status = make("span", { role: "status" });
    const progress = make("progress", { max: models[name]?.size || 1, value: 0, hidden: true, "aria-label": title });
    const button = make("button", { type: "button", class: "try-load", onclick: () => load(name).catch(() => {}) });
    const element = make("div", { class: "try-model", "data-model": name }, button, progress, status);
    function show(failure) {
      const engine = engines[name];
      button.hidden = Boolean(engine) || !canRun || !models[name];
      progress.hidden = engine?.state !== "loading";
      element.dataset.state = engine?.state || "stored";
      if (engine?.state === "loading") {
        const done = engine.got >= models[name].size;
        progress.value = engine.got;
        const words = done ? `${title}: starting …` : `${title}: loading, ${megabytes(models[name].size)}`;
        if (status.textContent !== words) status.textContent = words;
      } else if (engine) status.textContent = `${title} runs in this page.`;
      else if (failure?.name === name) status.textContent = `${title} could not be loaded: ${failure.error.message}. What you see are stored runs.`;
      else if (canRun && models[name]) {
        button.textContent = `Run ${title.toLowerCase()} here`;
        status.textContent = `Now: stored runs. It loads ${megabytes(models[name].size)} once; your browser keeps it.`;
      } else if (location.protocol === "file:") {
        status.textContent = `${title}: stored runs. To run it in the page, open the book with “companion book --serve”.`;
      } else status.textContent = `${title}: stored runs. It is not beside this copy of the book.`;
    }
    listeners.push(show);
    show(null);
    return element;
  }

  /* 1. The next token */
  function sumAt(found, temperature) {
    if (found.all) {
      const top = found.all[0] / temperature;
      return top + Math.log(found.all.reduce((sum, one) => sum + Math.exp(one / temperature - top), 0));
    }
    return found.sums[stored.explorer.temperatures.indexOf(temperature)];
  }
  function shares(found, temperature, topP) {
    const plain = found.tokens.map(([token, log]) => ({ token, before: Math.exp(log) }));
    if (temperature === 0) return plain.map((one, i) => ({ ...one, share: i === 0 ? 1 : 0 }));
    const sum = sumAt(found, temperature);
    let total = 0;
    const kept = plain.map((one, i) => {
      const share = Math.exp(found.tokens[i][1] / temperature - sum);
      const inside = total < topP - 1e-9;
      total += share;
      return { ...one, share: inside ? share : 0 };
    });
    let mass = kept.reduce((all, one) => all + one.share, 0);
    if (total < topP) mass = topP; // tokens that are not shown are kept, too
    return kept.map((one) => ({ ...one, share: one.share / mass }));
  }

  function explorer(root) {
    const beginnings = stored.explorer.beginnings;
    const known = new Map();
    for (const one of beginnings) {
      (function remember(node, words) {
        known.set(words, node);
        (node.next || []).forEach((next, i) => remember(next, words + node.tokens[i][0]));
      })(one, one.text);
    }
    const choice = make("select", {}, ...beginnings.map((one) => make("option", {}, one.text)));
    const area = make("textarea", { rows: 2, spellcheck: "false" });
    const list = make("ol", { class: "try-candidates", "aria-label": "The likeliest next tokens: a click appends one" });
    const said = make("p", { class: "try-said", role: "status" });
    let found = null;
    let ticket = 0;
    const past = [];
    const temperature = slider("Temperature", { min: 0, max: 2, step: 0.25, value: 1 }, draw);
    const topP = slider("Top-p", { min: 0.1, max: 1, step: 0.05, value: 1 }, draw);

    function draw() {
      list.replaceChildren();
      if (!found) return;
      const rows = shares(found, temperature.value, topP.value);
      for (const { token, before, share } of rows) {
        const bar = make("span", { class: "try-share", "aria-hidden": "true" });
        bar.style.setProperty("--share", share);
        bar.style.setProperty("--before", before);
        list.append(make("li", {}, make("button", {
          type: "button", class: share ? "" : "try-out",
          onclick: () => take(token, share),
        }, make("code", {}, visible(token)), bar, make("span", { class: "try-percent" }, percent(share)))));
      }
      const rest = Math.max(0, 1 - rows.reduce((all, one) => all + one.share, 0));
      list.append(make("li", { class: "try-rest" }, `all others together: ${percent(rest)}`));
    }
    async function look() {
      const words = area.value;
      const mine = ++ticket;
      if (runs("base")) {
        if (!words) { found = null; said.textContent = "Type the beginning of a text."; draw(); return; }
        const result = await probabilities(words);
        if (mine !== ticket) return;
        found = result;
        root.dataset.source = "model";
      } else {
        found = known.get(words) || null;
        root.dataset.source = "stored";
        if (!found) said.textContent = "There is no stored run for this text: run the model to see what follows.";
      }
      draw();
    }
    function take(token, share) {
      past.push(area.value);
      area.value += token;
      said.textContent = `Appended ${visible(token)}, which had ${percent(share)}.`;
      look();
    }
    function pick() {
      if (!found) return;
      const rows = shares(found, temperature.value, topP.value);
      let left = Math.random() * rows.reduce((all, one) => all + one.share, 0);
      const one = rows.find((row) => (left -= row.share) < 0) || rows[0];
      take(one.token, one.share);
    }
    choice.addEventListener("change", () => { area.value = choice.value; past.length = 0; said.textContent = ""; look(); });
    area.addEventListener("input", later(350, () => { said.textContent = ""; look(); }));
    area.value = beginnings[0].text;
    root.replaceChildren(
      make("h3", {}, "The next token"),
      bar("base", "The model"),
      field("A beginning", choice),
      field("The text so far", area),
      make("div", { class: "try-row" }, temperature.element, topP.element),
      make("div", { class: "try-row" },
        make("button", { type: "button", class: "try-main", onclick: pick }, "Draw a token"),
        make("button", { type: "button", onclick: () => found && take(found.tokens[0][0], shares(found, temperature.value, topP.value)[0].share) }, "Take the likeliest"),
        make("button", { type: "button", onclick: () => { if (past.length) { area.value = past.pop(); said.textContent = "Took one token back."; look(); } } }, "Take back")),
      said, list,
    );
    let ran = false;
    listeners.push(() => { if (runs("base") && !ran) { ran = true; look(); } });
    look();
  }

  /* 2. Tokens */
  let vocabulary = null;
  function openai() {
    vocabulary = vocabulary || new Promise((resolve, reject) => {
      const script = make("script", { src: `${here}tokenizer/o200k_base.js` });
      script.onload = () => resolve(window.GPTTokenizer_o200k_base);
      script.onerror = () => { vocabulary = null; reject(new Error("it is not beside this copy of the book")); };
      document.head.append(script);
    });
    return vocabulary;
  }
  function tokenizer(root) {
    const rows = stored.tokens;
    const choice = make("select", {}, ...rows.map((one) => make("option", {}, one.text)));
    const area = make("textarea", { rows: 2, spellcheck: "false" });
    const panels = {};
    let api = null;
    for (const [name, title] of [["smollm2", "SmolLM2, this course's model"], ["openai", "OpenAI's o200k_base"]]) {
      const count = make("p", { class: "try-count", role: "status" });
      const list = make("ol", { class: "try-chips" });
      panels[name] = { count, list, element: make("div", { class: `try-panel try-${name}` }, make("h4", {}, title), count, list) };
    }
    const button = make("button", { type: "button", class: "try-load", onclick: async () => {
      button.disabled = true;
      try { api = await openai(); button.hidden = true; show(); }
      catch (error) { button.disabled = false; panels.openai.count.textContent = `The vocabulary could not be loaded: ${error.message}.`; }
    } }, "Load OpenAI’s vocabulary (2 MB)");
    panels.openai.element.insertBefore(button, panels.openai.count);
    function put(name, tokens, missing) {
      const { count, list } = panels[name];
      list.replaceChildren(...(tokens || []).map((token) => make("li", {}, visible(token))));
      const each = tokens?.length ? (area.value.length / tokens.length).toFixed(1) : 0;
      count.textContent = tokens ? `${tokens.length} tokens, ${each} characters a token` : missing;
    }
    async function show() {
      const words = area.value;
      const known = rows.find((one) => one.text === words);
      put("openai", api ? api.encode(words).map((one) => api.decode([one])) : known?.openai, "Load the vocabulary to cut your own text.");
      if (runs("base")) { const found = await pieces("base", words); if (area.value === words) put("smollm2", found); }
      else put("smollm2", known?.smollm2, "Run the model to cut your own text.");
      root.dataset.source = runs("base") ? "model" : "stored";
    }
    choice.addEventListener("change", () => { area.value = choice.value; show(); });
    area.addEventListener("input", later(250, show));
    area.value = rows[0].text;
    root.replaceChildren(make("h3", {}, "The same text, cut by two models"), bar("base", "The model"),
      field("An example", choice), field("Your text", area),
      make("div", { class: "try-columns" }, panels.smollm2.element, panels.openai.element));
    let ran = false;
    listeners.push(() => { if (runs("base") && !ran) { ran = true; show(); } });
    show();
  }

  /* 3. Two models, one letter */
  function chat(root) {
    const rows = stored.chat;
    const short = (words) => (words.length > 60 ? `${words.slice(0, 60)} …` : words).replace(/\n+/g, " ");
    const choice = make("select", {}, ...rows.map((one, i) => make("option", { value: i }, short(one.letter))));
    const area = make("textarea", { rows: 4 });
    const log = make("div", { class: "try-log", role: "log", "aria-label": "The conversation", tabindex: "0" });
    const said = make("p", { class: "try-said", role: "status" });
    const history = [];
    let stop = null;
    const send = make("button", { type: "button", class: "try-main", onclick: ask }, "Send to both");
    const halt = make("button", { type: "button", onclick: () => stop?.abort(), hidden: true }, "Stop");
    function bubble(name, title, words) {
      const body = make("p", {}, words);
      return { body, element: make("div", { class: `try-bubble try-${name}` }, make("strong", {}, title), body) };
    }
    async function ask() {
      const letter = area.value.trim();
      if (!letter || stop) return;
      const known = rows.find((one) => one.letter === letter);
      const base = bubble("base", "Base model", "…");
      const tuned = bubble("tuned", "Fine-tuned on Fernway’s letters", "…");
      log.append(bubble("user", "Customer", letter).element, make("div", { class: "try-columns" }, base.element, tuned.element));
      if (known) log.append(make("p", { class: "try-right" }, `A person sorted it as ${known.right}`));
      log.scrollTop = log.scrollHeight;
      stop = new AbortController();
      halt.hidden = false;
      history.push({ role: "user", content: letter });
      const speeds = [];
      for (const [name, one, messages] of [["base", base, history.slice(-5)], ["tuned", tuned, history.slice(-1)]]) {
        try {
          if (runs(name)) {
            const result = await reply(name, messages, (words) => { one.body.textContent = words; log.scrollTop = log.scrollHeight; }, stop.signal);
            one.body.textContent = result.answer;
            one.element.dataset.source = "model";
            if (result.speed) speeds.push(`${result.speed.toFixed(0)} tokens a second`);
          } else if (known) one.body.textContent = known[name];
          else one.body.textContent = "There is no stored reply to this text: run the model.";
        } catch (error) { one.body.textContent += " (stopped)"; }
      }
      history.push({ role: "assistant", content: base.body.textContent });
      said.textContent = speeds.length ? `Answered, ${speeds.join(" and ")}.` : "These are stored replies.";
      stop = null;
      halt.hidden = true;
    }
    choice.addEventListener("change", () => { area.value = rows[choice.value].letter; });
    area.value = rows[1].letter;
    choice.value = "1";
    const fresh = make("button", { type: "button", onclick: () => { history.length = 0; log.replaceChildren(); said.textContent = "A new conversation."; } }, "Start again");
    root.replaceChildren(make("h3", {}, "A customer’s letter, two models"), bar("base", "The model"), bar("tuned", "The fine-tuned model"),
      field("A letter that neither was trained on", choice), field("The letter, or your own words", area),
      make("div", { class: "try-row" }, send, halt, fresh), said, log);
    ask();
  }

  /* 4. Attention */
  const LONGEST = 48; // tokens
  function attention(root) {
    const known = stored.attention;
    known.bytes = Uint8Array.from(atob(known.weights), (one) => one.charCodeAt(0));
    const sentence = known.tokens.join("");
    const { layers, heads } = known;
    let shown = known;
    let chosen = 0;
    let buttons = [];
    let ticket = 0;
    let opened = null;
    const area = make("textarea", { rows: 2, spellcheck: "false" });
    const layer = slider("Layer", { min: 1, max: layers, step: 1, value: 12 }, draw);
    const head = make("select", {}, make("option", { value: -1 }, "all heads, average"), ...Array.from({ length: heads }, (_, i) => make("option", { value: i }, `head ${i + 1}`)));
    head.addEventListener("change", draw);
    const first = make("input", { type: "checkbox", id: id("first") });
    first.addEventListener("change", draw);
    const said = make("p", { class: "try-said", role: "status" });
    const line = make("div", { class: "try-attention", role: "group", "aria-label": "The tokens of the sentence" });
    function row(place, one) {
      const size = (shown.tokens.length * (shown.tokens.length + 1)) / 2;
      const start = ((layer.value - 1) * heads + one) * size + (place * (place + 1)) / 2;
      return shown.bytes.subarray(start, start + place + 1);
    }
    function show(found, source) {
      shown = found;
      root.dataset.source = source;
      chosen = Math.max(0, found.tokens.length - 2);
      buttons = found.tokens.map((token, i) => make("button", { type: "button", onclick: () => { chosen = i; draw(); } }, visible(token)));
      line.replaceChildren(...buttons);
      draw();
    }
    function draw() {
      if (!buttons.length) return;
      const which = Number(head.value);
      const rows = which < 0 ? Array.from({ length: heads }, (_, i) => row(chosen, i)) : [row(chosen, which)];
      const shares = shown.tokens.slice(0, chosen + 1).map((_, i) => rows.reduce((all, one) => all + one[i], 0) / rows.length / 255);
      if (!first.checked && chosen > 0) {
        shares[0] = 0;
        const all = shares.reduce((sum, one) => sum + one, 0) || 1;
        shares.forEach((one, i) => { shares[i] = one / all; });
      }
      buttons.forEach((button, i) => {
        button.style.setProperty("--share", i <= chosen ? shares[i] : 0);
        button.setAttribute("aria-pressed", String(i === chosen));
        button.classList.toggle("try-later", i > chosen);
      });
      const top = shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([share]) => share > 0.005);
      said.textContent = `${visible(shown.tokens[chosen])} takes most from: ${top.map(([share, i]) => `${visible(shown.tokens[i])} (${percent(share)})`).join(", ")}`;
    }
    async function look() {
      const words = area.value;
      const mine = ++ticket;
      if (!runs("base")) {
        if (words === sentence) show(known, "stored");
        else said.textContent = "These are the weights of the stored sentence: run the model to follow your own.";
        return;
      }
      const tokens = await within("base", (wllama) => wllama.tokenize(words, true));
      if (tokens.length > LONGEST) { said.textContent = `That is ${tokens.length} tokens; up to ${LONGEST} are followed here.`; return; }
      if (mine !== ticket) return;
      if (!tokens.length) { said.textContent = "Type a sentence."; return; }
      const names = await pieces("base", words);
      try {
        opened = opened || (await (await import(`${here}attention.js`)).open(engines.base.file));
        const bytes = await opened.attend(tokens, (at) => {
          said.textContent = `Computing layer ${at + 1} of ${layers} …`;
          return mine === ticket;
        });
        if (bytes && mine === ticket) show({ tokens: names, bytes }, "model");
      } catch (error) { said.textContent = `The weights could not be computed: ${error.message}.`; }
    }
    area.value = sentence;
    area.addEventListener("input", later(600, look));
    root.replaceChildren(make("h3", {}, "Which tokens a token looks back at"), bar("base", "The model"),
      field("The sentence", area),
      make("div", { class: "try-row" }, layer.element, field("Head", head)),
      make("div", { class: "try-check" }, first, make("label", { for: first.id }, "count the first token, too (many heads rest on it)")),
      line, said);
    let ran = false;
    listeners.push(() => { if (runs("base") && !ran) { ran = true; look(); } });
    look();
  }

  const components = { explorer, tokenizer, chat, attention };
  document.querySelectorAll(".try[data-try]").forEach((root) => {
    root.setAttribute("role", "region");
    components[root.dataset.try](root);
    root.setAttribute("aria-label", root.querySelector("h3").textContent);
    root.classList.add("try-ready");
  });
})();
