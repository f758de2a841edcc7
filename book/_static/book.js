/* Every page: what was read and answered is remembered in this browser, and a pointer over a term shows its meaning. */
"use strict";
(() => {
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  const KEY = "gpt-at-work";
  const page = location.pathname.split("/").pop().replace(/\.html$/, "") || "index";

  // From a folder no page may read another one, so results come without their excerpts.
  if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS === "object") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

  function recall() {
    try { return JSON.parse(localStorage.getItem(KEY)) || {}; } catch { return {}; }
  }
  function remember(change) {
    const all = recall();
    all[page] = { ...all[page], ...change };
    try { localStorage.setItem(KEY, JSON.stringify(all)); } catch { /* a browser that keeps nothing */ }
  }
  const questions = (one) => Object.values(one.quiz || {});

  /* Quizzes: an option that is opened is an answer; the first one counts. */
  function quizzes() {
    const all = [...document.querySelectorAll(".quiz")];
    if (!all.length) return;
    const score = document.createElement("p");
    score.className = "quiz-score";
    score.setAttribute("role", "status");
    const again = document.createElement("button");
    again.type = "button";
    again.className = "quiz-again";
    again.textContent = "Start again";
    const foot = document.createElement("div");
    foot.className = "quiz-foot";
    foot.append(score, again);
    all.at(-1).after(foot);
    function show() {
      const given = questions(recall()[page] || {});
      const right = given.filter((one) => one === "right").length;
      foot.hidden = !given.length;
      score.textContent = `${given.length} of ${all.length} answered, ${right} right at once.`;
    }
    all.forEach((quiz, number) => {
      const options = [...quiz.querySelectorAll(".quiz-option")];
      options.forEach((option, place) => option.addEventListener("toggle", () => {
        if (!option.open) return;
        const { quiz: given = {}, opened = {} } = recall()[page] || {};
        if (!given[number]) given[number] = option.classList.contains("right") ? "right" : "wrong";
        opened[number] = [...new Set([...(opened[number] || []), place])];
        remember({ quiz: given, opened });
        show();
      }));
      for (const place of recall()[page]?.opened?.[number] || []) if (options[place]) options[place].open = true;
    });
    again.addEventListener("click", () => {
      remember({ quiz: {}, opened: {} });
      document.querySelectorAll(".quiz-option[open]").forEach((option) => { option.open = false; });
      show();
      all[0].querySelector("summary").focus();
    });
    show();
  }

  /* A chapter whose end came into view has been read: a mark in the contents, a line on the first page. */
  function progress() {
    const end = document.querySelector(".prev-next-footer");
    if (end && page !== "index" && page !== "search" && "IntersectionObserver" in window) {
      const watch = new IntersectionObserver((entries) => {
        if (entries.some((entry) => entry.isIntersecting) && window.scrollY > 200) { remember({ read: true }); watch.disconnect(); marks(); }
      });
      watch.observe(end);
    }
    marks();
    const holder = document.querySelector(".book-progress");
    if (!holder) return;
    const all = recall();
    const read = Object.values(all).filter((one) => one.read).length;
    const given = Object.values(all).flatMap(questions);
    if (!read && !given.length) return;
    const words = document.createElement("p");
    const right = given.filter((one) => one === "right").length;
    words.textContent = `In this browser: ${read} ${read === 1 ? "page" : "pages"} read, ${given.length} questions answered, ${right} right at once.`;
    const forget = document.createElement("button");
    forget.type = "button";
    forget.textContent = "Forget it";
    forget.addEventListener("click", () => { localStorage.removeItem(KEY); holder.replaceChildren(); marks(); });
    holder.replaceChildren(words, forget);
  }
  function marks() {
    const all = recall();
    document.querySelectorAll(".bd-links a.reference.internal").forEach((link) => {
      link.querySelector(".book-read")?.remove();
      const name = (link.getAttribute("href") || "").replace(/\.html.*$/, "").replace(/^#$/, page);
      if (!all[name]?.read) return;
      const mark = document.createElement("span");
      mark.className = "book-read";
      mark.setAttribute("role", "img");
      mark.setAttribute("aria-label", "read");
      mark.textContent = "✓";
      link.append(" ", mark);
    });
  }

  /* Previews: the line of the glossary or the bibliography, under the pointer or at the focus; Escape hides it. */
  let lines = null;
  function fetched() {
    lines = lines || new Promise((resolve) => {
      const script = document.createElement("script");
      script.src = `${here}previews.js`;
      script.onload = () => resolve(window.bookPreviews || {});
      script.onerror = () => resolve({});
      document.head.append(script);
    });
    return lines;
  }
  function previews() {
    const tip = document.createElement("div");
    tip.className = "book-preview";
    tip.id = "book-preview";
    tip.setAttribute("role", "tooltip");
    tip.hidden = true;
    document.body.append(tip);
    let current = null;
    function hide() {
      current?.removeAttribute("aria-describedby");
      current = null;
      tip.hidden = true;
    }
    async function show(link) {
      current = link;
      const all = await fetched();
      const [file, anchor] = link.getAttribute("href").split("#");
      const words = all[`${file || `${page}.html`}#${anchor}`];
      if (!words || current !== link) return;
      tip.textContent = words;
      tip.hidden = false;
      link.setAttribute("aria-describedby", tip.id);
      const box = link.getBoundingClientRect();
      const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
      const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
      tip.style.left = `${left + scrollX}px`;
      tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + scrollY}px`;
    }
    document.querySelectorAll('article a[href*="glossary.html#"], article a[href*="bibliography.html#"], article dl.glossary a[href^="#term"]').forEach((link) => {
      link.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") show(link); });
      link.addEventListener("pointerleave", hide);
      link.addEventListener("focus", () => show(link));
      link.addEventListener("blur", hide);
    });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  }

  /* Copy a cell's code; open the menus of the page's head. */
  function copying() {
    document.querySelectorAll("article .cell_input div.highlight, article div.highlight-shell div.highlight, article div[class*='highlight-'] > div.highlight").forEach((box) => {
      if (box.querySelector(".copybtn") || box.closest(".cell_output")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copybtn";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        try { await navigator.clipboard.writeText(box.querySelector("pre").innerText.replace(/\n$/, "")); button.textContent = "Copied"; }
        catch { button.textContent = "Not allowed here"; }
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
      box.append(button);
    });
  }
  function menus() {
    const buttons = [...document.querySelectorAll('[data-bs-toggle="dropdown"]')];
    function set(button, open) {
      button.setAttribute("aria-expanded", String(open));
      button.parentElement.querySelector(".dropdown-menu")?.classList.toggle("show", open);
    }
    buttons.forEach((button) => button.addEventListener("click", (event) => {
      event.stopPropagation();
      const open = button.getAttribute("aria-expanded") !== "true";
      buttons.forEach((other) => set(other, other === button && open));
    }));
    document.addEventListener("click", () => buttons.forEach((button) => set(button, false)));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      buttons.filter((button) => button.getAttribute("aria-expanded") === "true").forEach((button) => { set(button, false); button.focus(); });
    });
  }

  copying();
  menus();
  quizzes();
  progress();
  previews();
})();
