"use strict";
// Everything that came out of a job is put in as text or as an attribute, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const CHUNK = 24;
  const el = (tag, props = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(props)) {
      if (value === undefined || value === null || value === false) continue;
      if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  };

  // A browser that opened the page from disk shows a file instead of saving it: then in a tab of its own.
  const save = (props, text) => el("a", { target: "_blank", rel: "noopener", ...props }, text);

  const modality = (item) => {
    if (!item.file) return item.state === "succeeded" ? "other" : "failed";
    const type = item.type || "";
    const head = type.split("/")[0];
    if (["image", "audio", "video"].includes(head) && type !== "audio/midi" && type !== "audio/pcm") return head;
    return item.text !== undefined ? "text" : "other";
  };
  const bytes = (n) => {
    if (n === undefined || n === null) return "";
    const units = ["B", "kB", "MB", "GB", "TB"];
    let i = 0;
    while (n >= 1000 && i < 4) { n /= 1000; i++; }
    return `${n < 10 && i ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
  };
  const clock = (s) => {
    const whole = Math.round(s), m = Math.floor(whole / 60);
    return s < 10 ? `${(+s).toFixed(1)} s` : `${m}:${String(whole % 60).padStart(2, "0")}`;
  };
  const label = (item) => {
    const parts = item.id.split("/");
    return parts.length > 1 ? parts.slice(1).join("/") : parts[0];
  };
  const count = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
  const facts = (item) => {
    const meta = item.meta || {}, out = [];
    if (meta.width && meta.height) out.push(`${meta.width} × ${meta.height}`);
    if (meta.duration_s) out.push(clock(meta.duration_s));
    const wer = meta.wer ?? meta.word_error_rate;
    if (typeof wer === "number") out.push(`word error rate ${(wer * 100).toFixed(1)} %`);
    if (item.text !== undefined && item.type === "text/plain") {
      if (!item.cut) out.push(count(item.text.split(/\s+/).filter(Boolean).length, "word", "words"));
    } else out.push(bytes(item.size));
    return out.filter(Boolean);
  };

  for (const group of data.groups) {
    group.modes = new Set();
    for (const item of group.items) {
      item.mode = modality(item);
      group.modes.add(item.mode);
    }
    const jobs = new Map();
    for (const item of group.items) jobs.set(item.id, [...(jobs.get(item.id) || []), item]);
    group.jobs = jobs;
    // A clip brings its own still: it stands before the clip and is no picture of the row.
    for (const list of jobs.values()) {
      const clip = list.find((item) => item.mode === "video");
      if (!clip) continue;
      for (const item of list) if (item.mode === "image") { item.mode = "other"; clip.poster = item.file; }
    }
    group.hay = group.items.map((i) => [i.id, i.kind, i.name, i.ask, i.text, i.error, i.model, i.state].filter(Boolean).join(" ")).join("\n").toLowerCase();
  }
  // A player that has read nothing shows no length; hundreds of them would read hundreds of files.
  const players = data.groups.flatMap((group) => group.items).filter((item) => item.mode === "video" || item.mode === "audio").length;
  const preload = players > 100 ? "none" : "metadata";

  // What is looked at comes first; shared sounds and the like follow.
  const visual = (group) => group.modes.has("image") || group.modes.has("video");
  if (data.groups.some(visual)) data.groups.sort((a, b) => visual(b) - visual(a));

  // --- one group ---
  const caption = (item) => el("figcaption", {}, el("b", {}, label(item)), ...facts(item).map((f) => el("span", {}, f)));
  const shaped = (figure, item, usual) => {
    const { width, height } = item.meta || {};
    figure.style.setProperty("--r", width > 0 && height > 0 ? Math.min(4, Math.max(0.3, width / height)).toFixed(4) : usual.toFixed(4));
    return figure;
  };
  const picture = (item) => {
    const meta = item.meta || {};
    const img = el("img", { src: item.file, alt: item.ask ? item.ask.slice(0, 200) : item.id, loading: "lazy", decoding: "async", width: meta.width, height: meta.height });
    const button = el("button", { class: "shot", type: "button", "aria-label": `Enlarge ${item.id}`, onclick: () => enlarge(item) }, img);
    return shaped(el("figure", {}, button, caption(item)), item, 1);
  };
  const film = (item) => {
    const video = el("video", { src: item.file, controls: true, playsinline: true, preload, poster: item.poster, "aria-label": item.id });
    return shaped(el("figure", {}, video, caption(item)), item, 16 / 9);
  };
  const sound = (item) => el("figure", { class: "sound" }, caption(item), el("audio", { src: item.file, controls: true, preload, "aria-label": item.id }));
  const words = (item) => {
    const long = item.text.length > 900 || item.text.split("\n").length > 12;
    const body = el("p", { class: long ? "words long" : "words", dir: "auto" }, item.text.trim() || "(empty)");
    const figure = el("figure", {}, body);
    if (long) {
      const more = el("button", { class: "link", type: "button", "aria-expanded": "false" }, "Show all");
      more.addEventListener("click", () => {
        const open = body.classList.toggle("open");
        more.textContent = open ? "Show less" : "Show all";
        more.setAttribute("aria-expanded", String(open));
      });
      figure.append(more);
    }
    const cap = caption(item);
    if (item.cut) cap.append(save({ href: item.file, download: true }, "the whole text"));
    figure.append(cap);
    return figure;
  };
  const folded = (item) => {
    const plain = item.type === "text/plain";
    let text = item.text;
    if (item.type === "application/json" && !item.cut) {
      try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { /* shown as it is */ }
    }
    const shown = el("details", {}, el("summary", {}, el("b", {}, label(item)), ` ${[item.name, ...facts(item).filter((fact) => !/words?$/.test(fact))].join(" · ")}`));
    shown.addEventListener("toggle", () => {
      if (shown.open && shown.children.length === 1) shown.append(el(plain ? "p" : "pre", { class: plain ? "words" : "code", dir: "auto" }, text));
    });
    return shown;
  };
  const failure = (item) => el("div", { class: "failed" }, el("b", {}, `${item.id} ${item.state}`), ` ${item.kind}`, el("p", {}, item.error || "no reason was recorded"));
  const table = (items) => {
    const shown = el("details", { class: "made" }, el("summary", {}, items.length === 1 ? "How it was made" : `How these ${items.length.toLocaleString("en")} were made`));
    shown.addEventListener("toggle", () => {
      if (!shown.open || shown.children.length > 1) return;
      const rows = items.map((item) => el("tr", {},
        el("td", {}, item.file ? save({ href: item.file, download: item.name.split("/").pop() }, `${label(item)}/${item.name}`) : label(item)),
        el("td", {}, item.kind), el("td", {}, item.model || ""), el("td", {}, item.seed === undefined ? "" : String(item.seed)),
        el("td", { class: "ask" }, item.ask || "")));
      const head = el("tr", {}, ...["File", "Kind", "Model", "Seed", "Asked for"].map((name) => el("th", { scope: "col" }, name)));
      shown.append(el("table", { class: "facts" }, el("thead", {}, head), el("tbody", {}, ...rows)));
    });
    return shown;
  };

  const draw = (group) => {
    const { filter } = state;
    const visible = group.items.filter((item) => filter === "all" || item.mode === filter);
    const of = (mode) => visible.filter((item) => item.mode === mode);
    const first = (item) => group.jobs.get(item.id)[0] === item;
    const see = el("div", { class: "see" }), read = el("div", { class: "read" });
    see.append(...of("video").map(film));
    see.append(...of("image").map(picture));
    if (see.children.length > 4) see.classList.add(new Set([...see.children].map((one) => one.style.getPropertyValue("--r"))).size === 1 ? "even" : "many");
    read.append(...of("failed").map(failure));
    const texts = of("text");
    const open = texts.filter((item) => first(item) && item.kind.startsWith("text.") && item.type !== "application/json");
    read.append(...open.map(words), ...of("audio").map(sound));
    read.append(...texts.filter((item) => !open.includes(item) && (first(item) || filter === "text")).map(folded));
    const wide = visible.length > 2 || (see.children.length > 0 && open.length > 0) || open.some((item) => item.text.length > 600);
    const inside = el("div", { class: "inside" });
    if (see.children.length) inside.append(see);
    if (read.children.length) inside.append(read);
    if (see.children.length && read.children.length) inside.classList.add("both");
    inside.append(table(visible));
    const failed = group.items.filter((item) => item.mode === "failed").length;
    const info = group.jobs.size > 1 ? el("span", {}, count(group.jobs.size, "job", "jobs")) : el("span", {}, group.items[0].kind);
    return el("article", { class: wide ? "group wide" : "group" },
      el("div", { class: "head" }, el("h2", {}, group.name), info, failed && group.jobs.size > 1 ? el("span", { class: "flag" }, `${failed} failed`) : null), inside);
  };

  // --- what is shown ---
  const state = { filter: "all", query: "", found: [], next: 0 };
  const main = $("results");
  const fill = () => {
    const part = state.found.slice(state.next, state.next + CHUNK);
    state.next += part.length;
    main.append(...part.map(draw));
  };
  const watch = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && state.next < state.found.length) {
      fill();
      watch.unobserve($("more"));
      watch.observe($("more"));
    }
  }, { rootMargin: "1200px" });
  const show = () => {
    const needles = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    state.found = data.groups.filter((group) => (state.filter === "all" || group.modes.has(state.filter)) && needles.every((needle) => group.hay.includes(needle)));
    state.next = 0;
    main.replaceChildren();
    fill();
    $("none").hidden = state.found.length > 0;
    watch.unobserve($("more"));
    watch.observe($("more"));
  };

  const all = data.groups.flatMap((group) => group.items);
  const files = all.filter((item) => item.file);
  const failed = all.filter((item) => item.mode === "failed").length;
  const lost = all.filter((item) => item.error && item.state === "succeeded").length;
  $("summary").append(`${count(data.groups.length, "row", "rows")}, ${count(files.length, "file", "files")}, ${bytes(files.reduce((sum, item) => sum + (item.size || 0), 0))}`);
  if (failed) $("summary").append(", ", el("b", {}, `${count(failed, "job", "jobs")} failed`));
  if (lost) $("summary").append(", ", el("b", {}, `${count(lost, "file", "files")} not delivered`));
  if (data.left_out) $("summary").append(`; ${count(data.left_out, "more entry", "more entries")} in manifest.csv`);

  const names = { all: "All", image: "Pictures", video: "Video", audio: "Sound", text: "Text", other: "Other", failed: "Failed" };
  for (const [mode, name] of Object.entries(names)) {
    const n = mode === "all" ? all.length : all.filter((item) => item.mode === mode).length;
    if (!n) continue;
    $("filters").append(el("button", { type: "button", "data-mode": mode, "aria-pressed": String(mode === "all"), onclick: () => choose(mode) }, name, el("span", {}, n.toLocaleString("en"))));
  }
  const choose = (mode) => {
    state.filter = mode;
    for (const button of $("filters").children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    window.scrollTo(0, 0);
    show();
  };
  let timer;
  $("search").addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => { state.query = event.target.value; window.scrollTo(0, 0); show(); }, 120);
  });
  $("reset").addEventListener("click", () => { $("search").value = ""; state.query = ""; choose("all"); });

  // --- light and dark; a folder opened from disk may have no storage ---
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let theme = null;
  try { theme = localStorage.getItem("theme"); } catch { /* goes with the system */ }
  const paint = () => { root.dataset.theme = theme || (dark.matches ? "dark" : "light"); };
  dark.addEventListener("change", paint);
  $("theme").addEventListener("click", () => {
    theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", theme); } catch { /* for this visit only */ }
    paint();
  });
  paint();

  // --- pictures, large ---
  const box = $("box");
  let at = 0, album = [];
  const enlarge = (item) => {
    album = state.found.flatMap((group) => group.items.filter((one) => one.mode === "image"));
    at = Math.max(0, album.indexOf(item));
    turn(0);
    if (!box.open) box.showModal();
  };
  const turn = (step) => {
    at = (at + step + album.length) % album.length;
    const item = album[at];
    $("big").src = item.file;
    $("big").alt = item.ask || item.id;
    $("what").textContent = [item.id, ...facts(item), item.ask].filter(Boolean).join("  ·  ").slice(0, 300);
    $("save").href = item.file;
    $("save").download = item.name.split("/").pop();
  };
  $("prev").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => box.close());
  box.addEventListener("click", (event) => { if (event.target === box || event.target.className === "stage") box.close(); });
  document.addEventListener("keydown", (event) => {
    if (box.open) {
      if (event.key === "ArrowLeft") turn(-1);
      if (event.key === "ArrowRight") turn(1);
      return;
    }
    const typing = /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) { event.preventDefault(); $("search").focus(); }
    if (event.key === "Escape" && document.activeElement === $("search")) { $("search").value = ""; state.query = ""; show(); }
  });
  // One thing plays at a time.
  document.addEventListener("play", (event) => {
    for (const other of document.querySelectorAll("audio, video")) if (other !== event.target) other.pause();
  }, true);

  show();
})();
