/* Everything shown comes from data and is put in place as text, never as markup. No request leaves this page. */
(() => {
  const $ = (id) => document.getElementById(id);
  const read = (name) => JSON.parse($("data-" + name).textContent);
  const meta = read("meta"), index = read("index"), Q = index.queries, size = Q.name.length;
  const measure = index.loss ? "loss" : "measure";
  const FEW = 48;
  /** What a label is called: of classes a label, of predicted numbers a value, with the name it was given; texts that are
      taught without one are doubtful as texts. */
  const numeric = index.numeric, labelled = index.labelled, things = labelled ? "examples" : "texts", LABEL = numeric ? "value" : labelled ? "label" : "text";
  const target = (numeric && index.target.replace(/\s*\[.+\]\s*$/, "")) || LABEL, LABELLED = numeric ? target : "labelled";
  const titled = (name) => /^(query -?\d|mean over )/.test(name) ? capital(name) : name;  // somebody's text stays as it is
  const capital = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);

  /** An element; `on…` are listeners, `dataset` and ARIA names are attributes, children are nodes or text. */
  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "class") made.className = value;
      else if (name in made && !name.includes("-")) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  }
  /** At most so many letters, none cut in half. */
  const brief = (text, most = 80) => text.length > most ? [...text.slice(0, 2 * most)].slice(0, most).join("") + "…" : text;
  const isolated = (text, kind) => el("span", { class: kind || "", dir: "auto" }, text);

  // ------------------------------------------------------------------ numbers in words
  function plain(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const digits = size >= 1e-4 && size < 1e5 ? String(Number(size.toPrecision(3))) : size.toExponential(1);
    return (value < 0 ? "−" : "") + digits;
  }
  /** A number from the data with three digits, for a small card; whole numbers and other texts as they are. */
  function short(text) {
    const value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value) || Number.isInteger(value)) return text;
    return Math.abs(value) >= 999.5 && Math.abs(value) < 1e7 ? String(Math.round(value)) : String(Number(value.toPrecision(3)));
  }
  const signed = (value) => (value > 0 ? "+" : "") + plain(value);
  /** Never rounded up to all or nothing. */
  function percent(share) {
    const digits = share < 0.0995 || share > 0.99 ? 1 : 0, shown = (share * 100).toFixed(digits);
    return (share < 1 && Number(shown) === 100 ? ">99.9" : share > 0 && Number(shown) === 0 ? "<0.1" : shown) + "%";
  }
  const whole = (n) => n.toLocaleString("en");
  const good = (score) => (index.loss ? score > 0 : score < 0);
  const tone = (score) => (score === 0 ? "" : good(score) ? "help-word" : "harm-word");

  // ------------------------------------------------------------------ pieces, read when they are looked at
  const pieces = new Map(), waiting = new Map();
  window.ptifChunk = (name, value) => { const done = waiting.get(name); waiting.delete(name); if (done) done(value); };
  let turn = Promise.resolve(), since = 0;
  const pause = () => new Promise((resume) => setTimeout(resume, 0));
  function piece(name) {
    if (!pieces.has(name)) pieces.set(name, meta.folder ? outside(name) : inside(name));
    return pieces.get(name);
  }
  function inside(name) {
    // One after the other, and never long at a stretch: the page must go on scrolling.
    const found = turn.then(async () => {
      if (performance.now() - since > 20) { await pause(); since = performance.now(); }
      const block = $("data-" + name), value = JSON.parse(block.textContent);
      block.remove();
      return value;
    });
    turn = found.catch(() => undefined);
    return found;
  }
  function outside(name) {
    return new Promise((done, fail) => {
      waiting.set(name, done);
      const script = el("script", { src: meta.folder.split("/").map(encodeURIComponent).join("/") + "/" + name + ".js" });
      script.addEventListener("error", () => fail(new Error("missing " + name)));
      document.head.append(script);
    });
  }
  function place(sorted, value) {
    let low = 0, high = sorted.length;
    while (high - low > 1) { const middle = (low + high) >> 1; if (sorted[middle] <= value) low = middle; else high = middle; }
    return low;
  }
  async function example(i) { return (await piece("e" + place(meta.starts, i))).find((one) => one.i === i); }
  async function query(q) { return (await piece("q" + Math.floor(q / meta.perQuery)))[q % meta.perQuery]; }
  const lost = { k: "none", t: "This part of the report is missing; keep the folder " + meta.folder + " beside the page." };

  // ------------------------------------------------------------------ one example made visible
  function see(record, what, large) {
    const kind = "see " + (large ? "large " : "small ");
    if (record.k === "image") {
      const picture = el("img", { src: record.s, alt: what, class: record.w <= 64 ? "pixels" : "", draggable: false, decoding: "async" });
      return el("div", { class: kind }, picture);
    }
    const scrolls = large ? { tabindex: "0", role: "region", "aria-label": what } : {};
    if (record.k === "text") {
      const text = large ? record.t : brief(record.t, 240);
      const more = large && record.m ? el("p", { class: "faint" }, "… and " + whole(record.m) + " more letters") : null;
      return el("div", { class: kind + "words", ...scrolls }, el("p", { class: "text", dir: "auto" }, text || "(empty)"), more);
    }
    if (record.k === "table") {
      // A small card has room for a few columns: those in which the example is unusual, where that is known.
      const many = record.t.length + record.m > 5;
      const rows = large ? record.t : many && record.u ? record.u.map((at) => record.t[at]) : record.t.slice(0, many ? 4 : 5);
      const left = record.t.length - rows.length + record.m;
      const body = el("tbody", {}, ...rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row", title: name }, name), el("td", { title: value }, large ? value : short(value)))));
      const more = !large && record.u ? "… of " + whole(record.t.length + record.m) + " columns" : "… " + whole(left) + " more";
      if (left) body.append(el("tr", {}, el("th", { scope: "row", colSpan: 2, title: large ? "" : "Shown are the columns in which it is most unusual" }, more)));
      return el("div", { class: kind + "words", ...scrolls }, el("table", { class: "row" + (rows.every(([, value]) => value.length < 13) ? " numbers" : "") }, body));
    }
    return el("div", { class: kind + "none" }, record.t || "No picture or text at hand");
  }
  const named = (record) => "Training example " + record.i + (record.l ? ", " + LABELLED + " " + record.l : "");
  /** What the model says of an example, beside its label: a query's columns or a training example's record. */
  function verdict(said, sure, wrong, error) {
    if (said === undefined || said === null) return null;
    const known = wrong !== undefined && wrong !== null, off = error !== undefined && error !== null;
    const state = !known ? "" : wrong ? "wrong-word" : "right-word";
    return el("span", { class: state }, (!known ? "" : wrong ? "✗ " : "✓ ") + "model: ", isolated(brief(said)),
      sure === undefined || sure === null ? "" : " " + percent(sure), off ? el("span", { class: "error" }, " (error " + signed(error) + ")") : "");
  }

  /** A card that fills itself when its piece is there. */
  function card(i, score, side, extra) {
    const picture = el("button", { type: "button", class: "open", "aria-label": "Look at training example " + i, onclick: () => look(i) }, el("div", { class: "see" }));
    const lines = el("div", { class: "lines" });
    if (score !== null) lines.append(el("span", { class: "num " + tone(score) }, signed(score)));
    const made = el("li", { class: "card " + side }, picture, lines, extra || null, ticks(i));
    example(i).catch(() => ({ ...lost, i })).then((record) => {
      picture.replaceChildren(see(record, named(record), false));
      picture.setAttribute("aria-label", "Look at " + named(record) + (record.k === "text" ? ": " + brief(record.t) : ""));
      if (record.l) lines.append(isolated(record.l, "label"));
      if (record.wrong || record.err !== undefined) lines.append(verdict(record.said, record.sure, record.wrong, record.err));
      lines.append(el("span", { class: "faint" }, "#" + i, record.n ? " " : "", record.n ? isolated(record.n) : ""));
    });
    return made;
  }

  const texts = ptifTexts({ el, isolated, brief, whole, signed, plain, tone, index, example, look, ticks, see, lost });
  /** An example as large as there is room; `q` says by which query the tokens of a text are coloured. */
  const large = (record, q) => (record.p ? texts.text(record, texts.colours(record, q), 0, "") : see(record, named(record), true));
  async function look(i, q = -1) {
    const box = $("example"), record = await example(i).catch(() => ({ ...lost, i }));
    const entry = index.queue.find((one) => one.i === i);
    const facts = el("dl", { class: "facts" });
    const fact = (term, value) => facts.append(el("div", {}, el("dt", {}, term), el("dd", { dir: "auto" }, value)));
    if (record.l) fact(capital(target), record.l);
    const says = verdict(record.said, record.sure, record.wrong, record.err);
    if (says && !record.likely) fact("The model says", says.textContent.replace(/^model: /, ""));
    if (record.n) fact("Name", record.n);
    if (texts.sourceName(record)) fact("Source", texts.sourceName(record));
    if (record.o !== undefined) fact("Self-influence", plain(record.o));
    if (entry && entry.g) fact("Suggested label", entry.g);
    box.replaceChildren(
      el("button", { type: "button", class: "close", onclick: () => box.close() }, "Close"),
      el("h2", {}, "Training example " + i), large(record, q), facts,
      record.likely && record.likely.length ? el("div", { class: "part" }, likely(record.likely)) : "",
      entry ? el("div", { class: "part" }, el("h3", {}, labelled ? "Evidence that its " + LABEL + " is doubtful" : "Why it is worth a look"), ...evidence(entry, record)) : "",
      moved(record), ticks(i, true));
    box.showModal();
  }
  /** The queries that one training example helps and harms most. */
  function moved(record) {
    const list = (entries, side, title) => entries && entries.length ? el("div", {}, el("h3", { class: "head-" + side }, title),
      el("ul", {}, ...entries.map(([q, score]) => el("li", {}, askedLink(q), " ", el("span", { class: "num " + tone(score) }, signed(score)))))) : "";
    const helps = list(record.help, "help", "Queries it helps most"), harms = list(record.harm, "harm", "Queries it harms most");
    return helps || harms ? el("div", { class: "moved part" }, helps, harms) : "";
  }
  function askedLink(q) {
    return el("span", {}, el("a", { href: "#q/" + q, onclick: () => $("example").close() }, isolated(brief(Q.name[q]))),
      Q.label[q] ? " (" : "", Q.label[q] ? isolated(brief(Q.label[q])) : "", Q.label[q] ? ")" : "");
  }
  $("example").addEventListener("click", (event) => { if (event.target === $("example")) $("example").close(); });

  // ------------------------------------------------------------------ decisions
  const WORDS = { wrong_label: labelled ? "Wrong " + LABEL : "Take out", duplicate: "Duplicate", keep: "Keep" };
  const key = "ptif-report-" + meta.id;
  /** Index -> { word, as }: what was ticked, and the label the example should have, or null. */
  let decisions = new Map(), stored = true;
  const usable = (as) => as === null || (numeric ? Number.isFinite(as) : typeof as === "string" && as !== "");
  try {
    const held = JSON.parse(localStorage.getItem(key) || "[]");
    for (const [i, word, as = null] of held)
      if (Number.isInteger(i) && i >= 0 && i < index.n && Object.hasOwn(WORDS, word) && usable(as)) decisions.set(i, { word, as });
  } catch { stored = false; }
  const wordOf = (i) => (decisions.has(i) ? decisions.get(i).word : "");
  /** The buttons of one example; `full` adds what its label should be. Ticking changes colours only: nothing moves. */
  function ticks(i, full) {
    const box = el("div", { class: "ticks" + (full ? " full" : ""), role: "group", "aria-label": "Decision for training example " + i });
    box.dataset.of = i;
    for (const [word, text] of Object.entries(WORDS)) {
      const button = el("button", { type: "button", onclick: () => decide(i, word), "aria-pressed": String(wordOf(i) === word) }, text);
      button.dataset.word = word;
      box.append(button);
    }
    if (full && labelled) box.append(el("label", { class: "relabel" }, el("span", {}, numeric ? "Right value" : "Relabel as"), relabelling(i)));
    return box;
  }
  function relabelling(i) {
    const given = decisions.has(i) && decisions.get(i).as !== null ? String(decisions.get(i).as) : "";
    const change = (event) => {
      const text = event.target.value.trim(), as = text === "" ? null : numeric ? Number(text) : text;
      if (!usable(as)) return;
      if (as !== null || wordOf(i) === "wrong_label") decide(i, "wrong_label", as);
    };
    if (numeric) return el("input", { type: "number", step: "any", value: given, onchange: change, "aria-label": "Right value for training example " + i });
    const label = "Relabel training example " + i + " as";
    if (!index.classes) return el("input", { type: "text", value: given, onchange: change, "aria-label": label });
    const box = el("select", { onchange: change, "aria-label": label }, el("option", { value: "" }, "–"));
    const entry = index.queue.find((one) => one.i === i) || {};
    for (const name of index.classes.names) {
      const who = [entry.g === name ? "suggested" : "", entry.said === name ? "the model says so" : ""].filter((text) => text).join(", ");
      box.append(el("option", { value: name }, brief(name, 40) + (who ? " (" + who + ")" : "")));
    }
    box.value = given;
    return box;
  }
  /** Without `as` a second click on the same word takes it back. */
  function decide(i, word, as) {
    if (word === null || (as === undefined && wordOf(i) === word)) decisions.delete(i);
    else decisions.set(i, { word, as: as === undefined ? null : as });
    try { localStorage.setItem(key, JSON.stringify([...decisions].map(([at, one]) => [at, one.word, one.as]))); } catch { stored = false; }
    const now = decisions.get(i);
    for (const box of document.querySelectorAll('.ticks[data-of="' + i + '"]')) {
      for (const button of box.querySelectorAll("button")) button.setAttribute("aria-pressed", String(wordOf(i) === button.dataset.word));
      const field = box.querySelector(".relabel select, .relabel input");
      if (field) field.value = now && now.as !== null ? String(now.as) : "";
    }
    counted();
  }
  function counted() { $("decided").textContent = whole(decisions.size); tellWhatIf(); }

  // ------------------------------------------------------------------ what if what is ticked were removed
  const toRemove = () => [...decisions].filter(([, one]) => one.word !== "keep").map(([i]) => i).sort((a, b) => a - b);
  /** An example's scores on all queries, or null where the page had no room for them. */
  function effects(record) {
    if (!record.each) return null;
    const [unit, text] = record.each, bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const steps = new DataView(bytes.buffer);
    return Float64Array.from({ length: size }, (_, q) => unit * steps.getInt16(2 * q, true));
  }
  /** Sums over some examples: `mean` over all queries, and `each` query; `without` have no effects at hand. */
  async function summed(ids) {
    const sums = { mean: 0, each: new Float64Array(size), without: 0 };
    for (const i of ids) {
      const record = await example(i).catch(() => ({ all: NaN })), own = effects(record);
      sums.mean += record.all;
      if (own) own.forEach((value, q) => { sums.each[q] += value; }); else sums.without += 1;
    }
    return sums;
  }
  /** A change of the measure in words: to where, by how much, and whether that is good. */
  function change(value) {
    if (value === 0) return el("span", {}, "would not change");
    const worse = good(value), up = value > 0;
    return el("span", {}, "would " + (up ? "rise" : "fall") + " by ", el("b", { class: "num " + (worse ? "worse" : "better") }, plain(Math.abs(value))), worse ? " (worse)" : " (better)");
  }
  let asking = 0;
  async function tellWhatIf() {
    const ids = toRemove(), bar = $("whatif"), turn = ++asking;
    bar.hidden = bar.hidden || !ids.length || !$("view-decisions").hidden;  // that view says it in full
    if (!ids.length || !$("view-decisions").hidden) return;
    const sums = await summed(ids);
    if (turn !== asking) return;
    const open = !$("view-query").hidden && current >= 0;
    const words = ["Without the " + whole(ids.length) + " ticked example" + (ids.length === 1 ? "" : "s") + " the mean " + measure + " over " + (size === 1 ? "the query " : "all " + whole(size) + " queries "), change(sums.mean)];
    if (open && !sums.without) words.push("; on this query it ", change(sums.each[current]));
    if (open && sums.without) words.push("; on this query it is not known for " + whole(sums.without) + " of them");
    bar.querySelector("p").replaceChildren(...words, ". ", el("span", { class: "faint" }, ids.length > 1 ? "Sum of single effects." : "First order."));
    bar.hidden = false;
  }
  /** The same in full, for the view of decisions. */
  async function whatIf(box) {
    const ids = toRemove();
    if (!ids.length) return;
    const sums = await summed(ids), order = [...sums.each.keys()].sort((a, b) => sums.each[a] - sums.each[b] || a - b);
    const list = (queries, side, title) => queries.length ? el("div", {}, el("h3", { class: "head-" + side }, title),
      el("ul", {}, ...queries.map((q) => el("li", {}, askedLink(q), " ", el("span", { class: "num" }, signed(sums.each[q])))))) : "";
    const better = (index.loss ? order : [...order].reverse()).filter((q) => sums.each[q] !== 0 && !good(sums.each[q])).slice(0, 5);
    const worse = (index.loss ? [...order].reverse() : order).filter((q) => good(sums.each[q])).slice(0, 5);
    box.append(el("h2", {}, "What if they were removed?"),
      el("p", {}, "Without the " + (ids.length === 1 ? "example" : whole(ids.length) + " examples") + " ticked as " + WORDS.wrong_label.toLowerCase() + " or duplicate the mean " + measure + " over " + (size === 1 ? "the query " : "all " + whole(size) + " queries "), change(sums.mean), ". This is the sum of what each would do alone: copies of one example do more together than the sum says, and a new label does more than a removal. ",
        el("code", {}, "ptif.what_if(problem, remove=…, relabel=…)"), " holds both."),
      sums.without ? el("p", { class: "faint" }, "For " + whole(sums.without) + " of them the page had no room to hold the effect on every query.")
        : el("div", { class: "moved" }, list(better, "help", "Queries that would gain most"), list(worse, "harm", "Queries that would lose most")));
  }

  async function decided() {
    const found = [];
    for (const i of [...decisions.keys()].sort((a, b) => a - b)) {
      const record = await example(i).catch(() => ({}));
      const entry = index.queue.find((one) => one.i === i) || {};
      found.push({ index: i, decision: wordOf(i), label: record.l || null, name: record.n || null,
        suggested_label: entry.g || null, self_influence: record.o === undefined ? null : record.o, relabel_as: decisions.get(i).as });
    }
    return found;
  }
  function csv(rows) {
    const names = ["index", "decision", "label", "name", "suggested_label", "self_influence", "relabel_as"];
    const cell = (value) => {
      if (value === null) return "";
      if (typeof value === "number") return String(value);
      // A spreadsheet would take these for a formula.
      const text = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
      return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
    };
    return [names, ...rows.map((row) => names.map((name) => cell(row[name])))].map((line) => line.join(",") + "\r\n").join("");
  }
  async function download(kind) {
    const rows = await decided();
    const whole = { format: "pytorch-influence-functions/decisions", version: 2, report: meta.id, title: meta.title,
      training_examples: index.n, decisions: rows };
    const text = kind === "csv" ? csv(rows) : JSON.stringify(whole, null, 2) + "\n";
    const address = URL.createObjectURL(new Blob([text], { type: kind === "csv" ? "text/csv" : "application/json" }));
    const link = el("a", { href: address, download: "decisions." + kind });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }
  /** What to do with the downloaded file: on the command line, and in Python. */
  function carryOut() {
    const code = (text) => el("code", {}, text);
    return [el("h2", {}, "Carry them out"),
      el("p", {}, "In a terminal, with the downloaded file: ", code("ptif what-if task.py --decisions decisions.json"), " predicts what they change; ", code("ptif curate task.py decisions.json"), " trains on the edited data and compares."),
      el("p", {}, "In Python: ", code("ptif.what_if(problem, remove=…, relabel=…)"), " and ", code('ptif.actions.curate(train, "decisions.json").retrain(recipe, test)'), ".")];
  }
  async function showDecisions() {
    const rows = await decided(), box = $("decisions"), begins = new Map();
    if (!labelled) for (const row of rows) begins.set(row.index, (await example(row.index).catch(() => ({}))).t);
    const columns = ["Example", capital(target), "Decision", ...(labelled ? [numeric ? "Right value" : "Relabel as"] : []), el("span", { class: "away" }, "Take back")];
    const body = rows.map((row) => el("tr", {},
      el("td", {}, el("button", { type: "button", onclick: () => look(row.index) }, "#" + row.index)),
      el("td", { dir: "auto" }, brief(row.label || (labelled ? "" : begins.get(row.index) || ""))), el("td", {}, WORDS[row.decision]),
      labelled ? el("td", { dir: "auto" }, row.relabel_as === null ? "" : brief(String(row.relabel_as))) : "",
      el("td", {}, el("button", { type: "button", "aria-label": "Forget the decision for example " + row.index,
        onclick: () => { decide(row.index, null); showDecisions(); } }, "Forget"))));
    const foreseen = el("div");
    await whatIf(foreseen);
    const keeps = stored ? "They are kept in this browser for this report." : "This browser keeps nothing for files: download them before you close the page.";
    box.replaceChildren(
      el("p", {}, rows.length ? whole(rows.length) + " training example" + (rows.length === 1 ? " is" : "s are") + " ticked. " + keeps
        : "Nothing is ticked yet. Cards of training examples have the buttons " + WORDS.wrong_label + ", Duplicate and Keep. " + keeps),
      el("div", { class: "actions" },
        el("button", { type: "button", class: "main", disabled: !rows.length, onclick: () => download("csv") }, "Download CSV"),
        el("button", { type: "button", class: "main", disabled: !rows.length, onclick: () => download("json") }, "Download JSON")),
      rows.length ? el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Decisions" }, el("table", { class: "data words" },
        el("thead", {}, el("tr", {}, ...columns.map((word) => el("th", { scope: "col" }, word)))), el("tbody", {}, ...body))) : "",
      foreseen, ...carryOut(), el("h2", {}, "The format"),
      el("p", {}, "CSV: one line per ticked example with the columns ", el("code", {}, "index,decision,label,name,suggested_label,self_influence,relabel_as"),
        ". ", el("code", {}, "index"), " is the position in the training dataset, from 0; ", el("code", {}, "decision"), " is ",
        el("code", {}, "wrong_label"), ", ", el("code", {}, "duplicate"), " or ", el("code", {}, "keep"),
        "; what is not known is empty. A text that a spreadsheet would take for a formula has an apostrophe in front."),
      el("p", {}, "JSON: ", el("code", {}, '{"format": "pytorch-influence-functions/decisions", "version": 2, "report", "title", "training_examples", "decisions": [{"index", "decision", …}]}'),
        " with the same names; what is not known is ", el("code", {}, "null"), "."),
      el("p", {}, "Read back in Python: ", el("code", {}, 'ptif.report.read_decisions("decisions.json")'), "."));
  }

  // ------------------------------------------------------------------ queries: the grid
  const filters = { search: "", label: "", wrong: "", sure: "", sort: "order" };
  let visible = [...Array(size).keys()], drawn = 0;
  const BANDS = { "": [-1, 2], "below 50%": [-1, 0.5], "50 to 80%": [0.5, 0.8], "80 to 95%": [0.8, 0.95], "above 95%": [0.95, 2] };
  const has = (column) => Q[column] && Q[column].some((value) => value !== null);
  const SORTS = {};
  if (has("wrong") && has("sure")) SORTS.worst = "mistakes first";
  if (has("err")) Object.assign(SORTS, { worst: "largest error first", best: "smallest error first" });
  if (has("sure")) Object.assign(SORTS, { unsure: "least confident first", sure: "most confident first" });
  SORTS.order = "in dataset order";
  filters.sort = Object.keys(SORTS)[0];
  /** What a query is sorted by, the largest first. */
  const RANKS = {
    worst: (q) => has("err") ? Math.abs(Q.err[q] ?? -1) : Q.wrong[q] === null ? -2 : Q.wrong[q] ? 1 + (Q.sure[q] ?? 0) : -(Q.sure[q] ?? 1),
    best: (q) => -Math.abs(Q.err[q] ?? Infinity), unsure: (q) => -(Q.sure[q] ?? 2), sure: (q) => Q.sure[q] ?? -1, order: (q) => -q,
  };
  function selected(name, options, shown) {
    const box = el("select", { onchange: (event) => { filters[name] = event.target.value; filtered(); } });
    for (const [value, text] of options) box.append(el("option", { value }, text));
    return el("label", {}, shown, box);
  }
  function fillFilters() {
    const form = $("filters"), labels = [...new Set(Q.label)].filter((label) => label !== "");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(el("label", { class: "wide" }, labelled ? "Search names, labels, texts" : "Search names, texts",
      el("input", { type: "search", oninput: (event) => { filters.search = event.target.value; filtered(); } })));
    if (labels.length > 1 && labels.length <= 200 && !numeric) form.append(selected("label", [["", "all"], ...labels.map((label) => [label, label])], "Label"));
    if (Q.wrong && Q.wrong.some((wrong) => wrong !== null)) form.append(selected("wrong", [["", "all"], ["1", "wrong only"], ["0", "right only"]], "Answered"));
    if (has("sure")) form.append(selected("sure", Object.keys(BANDS).map((band) => [band, band || "any"]), "Confidence"));
    if (Object.keys(SORTS).length > 1) form.append(selected("sort", Object.entries(SORTS), "Order"));
  }
  /** Which queries are asked for, in the order asked for. */
  function arrange() {
    const words = filters.search.trim().toLowerCase(), [low, high] = BANDS[filters.sure];
    visible = [...Array(size).keys()].filter((q) => {
      if (filters.label && Q.label[q] !== filters.label) return false;
      if (filters.wrong && String(Q.wrong[q]) !== filters.wrong) return false;
      if (filters.sure && (Q.sure[q] === null || Q.sure[q] < low || Q.sure[q] >= high)) return false;
      return !words || [Q.name[q], Q.label[q], Q.said ? Q.said[q] : "", Q.text ? Q.text[q] : ""].join("\n").toLowerCase().includes(words);
    });
    const rank = RANKS[filters.sort];
    visible.sort((a, b) => rank(b) - rank(a) || a - b);
  }
  function filtered() {
    arrange();
    $("count").textContent = visible.length === size ? whole(size) + (size === 1 ? " query" : " queries")
      : whole(visible.length) + " of " + whole(size) + " queries";
    $("grid").replaceChildren();
    drawn = 0;
    more();
  }
  function more() {
    const grid = $("grid");
    for (const q of visible.slice(drawn, drawn + FEW)) grid.append(tile(q));
    drawn = Math.min(visible.length, drawn + FEW);
    $("more").hidden = drawn >= visible.length;
  }
  const answer = (q) => (Q.said ? verdict(Q.said[q], Q.sure[q], Q.wrong[q], Q.err[q]) : null);
  function tile(q) {
    const picture = el("div", { class: "see" });
    const link = el("a", { href: "#q/" + q }, picture, el("div", { class: "lines" },
      isolated(Q.name[q], "faint"), Q.label[q] ? isolated(Q.label[q], "label") : null, answer(q)));
    query(q).catch(() => lost).then((record) => picture.replaceWith(see(record, "", false)));
    return el("li", { class: "tile" }, link);
  }
  function moveInGrid(event) {
    const links = [...$("grid").querySelectorAll("a")], at = links.indexOf(document.activeElement);
    if (at < 0) return;
    const columns = links.filter((link) => link.offsetTop === links[0].offsetTop).length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const next = links[at + step];
    if (next) next.focus();
  }

  // ------------------------------------------------------------------ queries: one of them
  let current = -1;
  async function showQuery(q) {
    const record = await query(q).catch(() => ({ ...lost, help: [], harm: [], hist: { lo: 0, hi: 0, n: [0] } }));
    if (location.hash !== "#q/" + q) return;
    current = q;
    tellWhatIf();
    if (!visible.includes(q)) visible = [...Array(size).keys()];
    const at = visible.indexOf(q), box = $("view-query");
    const step = (by, text) => el("button", { type: "button", disabled: at + by < 0 || at + by >= visible.length, onclick: () => go(by) }, text);
    const cards = (list, side) => el("ol", { class: "cards" }, ...list.map(([i, score]) => card(i, score, side)));
    const asked = record.p ? texts.asked(record, Q.name[q]) : { box: see(record, Q.name[q] + (Q.label[q] ? ", " + LABELLED + " " + Q.label[q] : ""), true), colour: () => undefined };
    const up = index.loss ? "raise" : "lower", down = index.loss ? "lower" : "raise";
    const heads = {
      help: el("h2", { class: "head-help" }, "Most helpful", el("small", {}, "Removing one would " + up + " the " + measure + " on this query, by the number shown.")),
      harm: el("h2", { class: "head-harm" }, "Most harmful", el("small", {}, "Removing one would " + down + " the " + measure + " on this query, by the number shown. Where all help, these help least.")),
    };
    box.replaceChildren(
      el("div", { class: "steps" }, el("a", { href: "#queries" }, "All queries"), step(-1, "← Previous"), step(1, "Next →"),
        el("span", { class: "where" }, whole(at + 1) + " of " + whole(visible.length), el("span", { class: "keys" }, " · arrow keys move"))),
      el("h1", { dir: "auto" }, titled(brief(Q.name[q], 160))), warning(),
      el("div", { class: "query" },
        el("div", { class: "side" }, asked.box,
          el("div", {}, Q.label[q] ? el("p", {}, capital(target) + ": ", isolated(brief(Q.label[q], 160), "label")) : "", answer(q) || ""),
          record.likely && record.likely.length ? likely(record.likely) : "", texts.bySource(record), histogram(record)),
        el("div", {}, ...(index.tokens ? texts.lists(q, record, asked.colour, heads) : [heads.help, cards(record.help, "help"), heads.harm, cards(record.harm, "harm")]))),
      record.k === "table" && record.t.length + record.m > 5 ? sideBySide(q, record) : "", askFurther(q, record));
    $("live").textContent = Q.name[q] + ", " + (at + 1) + " of " + visible.length;
  }
  /** Who comes here by a link has not read the overview: where an assumption is broken, its verdict stands here too. */
  function warning() {
    const broken = document.querySelector("#view-overview .verdict.bad");
    return broken ? el("p", { class: "verdict bad" }, broken.textContent + " ", el("a", { href: "#overview" }, "See which")) : "";
  }
  /** What else the command line says about this query, where its data allow it. */
  function askFurther(q, record) {
    if (!["image", "table"].includes(record.k) || Q.id[q] < 0) return "";
    const first = record.help.slice(0, 3).map(([i]) => i).join(","), asked = " task.py --queries " + Q.id[q];
    const line = (text, verb, flags) => el("li", {}, text, ": ", el("code", {}, "ptif " + verb + asked + flags));
    const kind = record.k === "image" ? "pixels" : "columns";
    return el("section", { class: "further" }, el("h2", {}, "Ask further", el("small", {}, "In a terminal, with a task file that says which model and data.")),
      el("ul", {}, line("Which " + kind + " of the training examples matter to it", "input-influence", first ? " --examples " + first + " --plot heat.png" : ""),
        ...(numeric ? [] : [line("Without which few examples the answer flips", "flip", ""),
          line("Whether small changes of training inputs flip it", "attack", " --count 10" + (record.k === "image" ? " --size 2/255 --bounds 0:1" : " --size 0.1"))])));
  }
  /** All columns of a table row beside those of its first helpful and harmful examples. */
  function sideBySide(q, record) {
    const picked = [...record.help.slice(0, 4).map(([i]) => [i, "help"]), ...record.harm.slice(0, 4).map(([i]) => [i, "harm"])];
    const box = el("div", { class: "scroll beside", tabindex: "0", role: "region", "aria-label": "All columns side by side" });
    Promise.all(picked.map(([i]) => example(i).catch(() => ({ ...lost, i })))).then((records) => {
      const heads = picked.map(([i, side]) => el("th", { scope: "col", class: side + "-word" }, el("button", { type: "button", onclick: () => look(i) }, "#" + i)));
      const line = (name, values) => el("tr", {}, el("th", { scope: "row", title: name }, name), ...values.map((value) => el("td", {}, value)));
      const value = (one, at) => (one.k === "table" && one.t[at] ? one.t[at][1] : "–");
      const rows = record.t.map(([name, own], at) => line(name, [own, ...records.map((one) => value(one, at))]));
      if (Q.label[q]) rows.unshift(line(capital(target), [Q.label[q], ...records.map((one) => one.l || "–")]));
      if (record.m) rows.push(line("… " + whole(record.m) + " more", []));
      box.append(el("table", { class: "data" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Column"), el("th", { scope: "col" }, "This query"), ...heads)), el("tbody", {}, ...rows)));
    });
    return el("div", {}, el("h2", {}, "All columns side by side", el("small", {}, "The query, its most helpful (blue) and its most harmful (orange) training examples.")), box);
  }
  function likely(list) {
    const rows = list.map(([name, share]) => {
      const fill = el("span", { class: "fill" });
      fill.style.width = Math.max(0, Math.min(1, share)) * 100 + "%";
      return el("div", {}, el("span", { class: "name", dir: "auto", title: name }, name), el("span", { class: "track" }, fill), el("span", { class: "num" }, percent(share)));
    });
    return el("div", {}, el("h3", {}, "What the model says"), el("div", { class: "said" }, ...rows));
  }
  function histogram(record) {
    const { lo, hi, n } = record.hist, W = 600, H = 150, base = 118, width = hi - lo || 1;
    const draw = (tag, attributes) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      return made;
    };
    const top = Math.log1p(Math.max(...n)), x = (score) => Math.max(1, Math.min(W - 1, ((score - lo) / width) * W));
    const total = n.reduce((a, b) => a + b, 0);
    const label = "Histogram of " + whole(total) + " scores from " + plain(lo) + " to " + plain(hi) + "; " + record.help.length + " helpful and " + record.harm.length + " harmful ones are shown on this page";
    const picture = draw("svg", { viewBox: "0 0 " + W + " " + H, preserveAspectRatio: "none", role: "img", "aria-label": label });
    n.forEach((count, at) => {
      if (!count) return;
      const height = Math.max(2, (Math.log1p(count) / (top || 1)) * (base - 6)), step = W / n.length;
      picture.append(draw("rect", { x: at * step, y: base - height, width: Math.max(1, step - 1.5), height }));
    });
    picture.append(draw("line", { class: "axis", x1: 0, x2: W, y1: base, y2: base }));
    if (lo < 0 && hi > 0) picture.append(draw("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: base }));
    for (const [side, list] of [["help-tick", record.help], ["harm-tick", record.harm]])
      for (const [, score] of list) picture.append(draw("line", { class: side, x1: x(score), x2: x(score), y1: base + 4, y2: H - 2 }));
    return el("figure", { class: "hist" }, el("h3", {}, "All scores of this query"), picture,
      el("div", { class: "ends num" }, el("span", {}, signed(lo)), el("span", {}, signed(hi))),
      el("figcaption", {}, "Heights grow with the logarithm of the count. Marks below: solid, the helpful ones shown; dashed, the harmful ones."));
  }
  function go(by) {
    const next = visible[visible.indexOf(current) + by];
    if (next !== undefined) location.hash = "#q/" + next;
  }

  // ------------------------------------------------------------------ the training set
  const mostOwn = Math.max(...index.queue.map((entry) => entry.o ?? -Infinity));
  function evidence(entry, record) {
    const lines = [];
    const change = (harm) => (harm >= 0) === index.loss ? "lower" : "raise";
    if (entry.said !== undefined && !(record && (record.likely || numeric))) lines.push(el("p", {}, verdict(entry.said, entry.sure, entry.wrong, entry.err)));
    if (entry.o !== undefined) lines.push(el("p", {}, "Self-influence ", el("b", { class: "num" }, plain(entry.o)), entry.o === mostOwn ? ", the largest of all." : ", above " + percent(entry.p) + " of all."));
    if (entry.g) lines.push(el("p", {}, "Suggested label: ", isolated(brief(entry.g), "label"), index.suggestedBy === "model" ? ", the model's own" : "", entry.gh === undefined ? "." : ". Without this example the " + measure + " of one in ten such queries would be " + (index.loss ? "lower" : "higher") + " by " + plain(entry.gh) + " or more."));
    lines.push(el("p", {}, "Over all queries, removing it would " + change(entry.h) + " the mean " + measure + " by " + plain(Math.abs(entry.h)) + "."));
    if (entry.q.length && !record) lines.push(el("p", {}, index.classes ? "Opponents (queries of other classes it harms most):" : "Queries it harms most:"),
      el("ul", {}, ...entry.q.map(([q, score]) => el("li", {}, askedLink(q), " ", el("span", { class: "num" }, signed(score))))));
    return lines;
  }
  function growing(box, entries, make, first = 24) {
    let at = 0;
    const list = el("ul", { class: "queue" });
    const button = el("button", { type: "button", onclick: () => next() }, "Show more");
    function next() {
      for (const entry of entries.slice(at, at + first)) list.append(make(entry));
      at += first;
      button.hidden = at >= entries.length;
    }
    next();
    box.append(list, el("p", { class: "centre" }, button));
  }
  function suspect(entry) {
    const picture = el("button", { type: "button", class: "open", "aria-label": "Look at training example " + entry.i, onclick: () => look(entry.i) }, el("div", { class: "see" }));
    const head = el("h3", {}, "#" + entry.i);
    if (entry.n) head.append(" ", isolated(brief(entry.n), "faint"));
    if (entry.l) head.append(" " + LABELLED + " ", isolated(brief(entry.l), "label"));
    example(entry.i).catch(() => ({ ...lost, i: entry.i })).then((record) => {
      picture.replaceChildren(see(record, named(record), false));
      if (record.l && !entry.l) head.append(" " + LABELLED + " ", isolated(brief(record.l), "label"));
    });
    return el("li", { class: "suspect" }, picture, el("div", {}, head, ...evidence(entry)), ticks(entry.i, true));
  }
  const BY = {
    doubt: "Ordered by the doubt that the report was given, such as that of find_label_issues().",
    loss: "Ordered by the model's loss on the " + LABEL + (labelled ? "; find_label_issues() finds more wrong " + LABEL + "s." : "."),
    self: "Ordered by self-influence: " + (labelled ? "the model leans on these " + LABEL + "s alone, which a wrong one needs." : "how much the model leans on a text to predict that text itself, as odd ones need."),
    mean: "Ordered by mean harm over all queries" + (labelled ? "; with train_predictions= the model's loss is taken in, which finds wrong " + LABEL + "s better." : ": the texts without which the model would answer better."),
    turns: "Taken by turns from two orders: the largest " + (index.queue.some((entry) => entry.o !== undefined) ? "self-influence (the model leans on this " + LABEL + " alone)" : "mean harm over all queries") + ", and the largest error of the model, which typing errors have.",
  };
  const wanted = { search: "", label: "", state: "", sort: "" };
  /** Which entries of the queue are asked for, in the order asked for. */
  function wantedSuspects() {
    const words = wanted.search.trim().toLowerCase();
    const entries = index.queue.filter((entry) => (!wanted.label || entry.l === wanted.label)
      && (wanted.state === "" || (wanted.state === "open" ? !decisions.has(entry.i) : wanted.state === "done" ? decisions.has(entry.i) : entry.wrong === 1))
      && (!words || ["#" + entry.i, entry.l, entry.n, entry.t, entry.said, entry.g].join("\n").toLowerCase().includes(words)));
    const rank = { own: (e) => e.o, harm: (e) => e.h, error: (e) => Math.abs(e.err ?? -1), model: (e) => (e.wrong ? 1 + (e.sure ?? 0) : -(e.sure ?? 1)), index: (e) => -e.i }[wanted.sort];
    return rank ? entries.sort((a, b) => rank(b) - rank(a) || a.i - b.i) : entries;
  }
  function suspects(box) {
    if (!index.queue.length) { box.append(el("p", {}, "No text harms these queries on average, so none is more worth a look than another.")); return; }
    const list = el("div"), count = el("p", { class: "faint", role: "status" }), form = el("form", { class: "filters", role: "search" });
    const draw = () => {
      const entries = wantedSuspects(), all = index.queue.length;
      count.textContent = entries.length === all ? whole(all) + " training " + things : whole(entries.length) + " of " + whole(all) + " training " + things;
      list.replaceChildren();
      growing(list, entries, suspect);
    };
    const choice = (name, options, shown) => {
      const picked = el("select", { onchange: (event) => { wanted[name] = event.target.value; draw(); } }, ...options.map(([value, text]) => el("option", { value }, text)));
      picked.value = wanted[name];
      form.append(el("label", {}, shown, picked));
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(el("label", { class: "wide" }, labelled ? "Search " + LABEL + "s, names, #index" : "Search texts, #index",
      el("input", { type: "search", value: wanted.search, oninput: (event) => { wanted.search = event.target.value; draw(); } })));
    const labels = [...new Set(index.queue.map((entry) => entry.l))].filter((label) => label).sort();
    if (labels.length > 1 && labels.length <= 200 && !numeric) choice("label", [["", "all"], ...labels.map((label) => [label, brief(label, 40)])], "Label");
    const states = [["", "all"], ["open", "undecided"], ["done", "decided"]];
    choice("state", index.queue.some((entry) => entry.wrong === 1) ? [...states, ["other", "the model disagrees"]] : states, "Show");
    const sorts = [["", "most doubtful first"]];
    if (index.queue.some((entry) => entry.err !== undefined)) sorts.push(["error", "largest error first"]);
    if (index.queue.some((entry) => entry.wrong !== undefined)) sorts.push(["model", "model surest of another label"]);
    if (index.queue.some((entry) => entry.o !== undefined)) sorts.push(["own", "largest self-influence"]);
    choice("sort", [...sorts, ["harm", "most harm over all queries"], ["index", "in dataset order"]], "Order");
    box.append(el("p", {}, "The " + whole(index.queue.length) + (labelled ? " training examples whose " + LABEL + "s are" : " training texts") + " most worth a look, worst first. " + BY[index.queueBy]), form, count, list);
    draw();
  }
  const panels = {
    labels: ["Doubtful " + LABEL + "s", suspects],
    pairs: ["Pairs", (box) => {
      if (!index.compared) { box.append(el("p", {}, "Inputs were not compared: the training data were not at hand.")); return; }
      const among = index.compared === index.n ? "all " + whole(index.n) + " training examples" : "the " + whole(index.compared) + " most influential training examples";
      box.append(el("p", {}, "Inputs were compared among " + among + "; a pair is listed when it differs by at most a quarter of what two random examples differ by."));
      const conflicts = ["other", "Conflicting: nearly the same input, another " + LABEL, "No conflicting pair was found."];
      for (const [kind, title, none] of [...(labelled ? [conflicts] : []), ["same", "Near duplicates: nearly the same " + (labelled ? "input and " : "") + LABEL, "No near duplicates were found."]]) {
        box.append(el("h2", {}, title + " (" + index.pairs[kind].length + ")"));
        if (index.pairs[kind].length) growing(box, index.pairs[kind], pair, 12); else box.append(el("p", { class: "faint" }, none));
      }
    }],
    classes: ["Classes", classes],
    influential: ["Most influential", (box) => {
      const list = (entries, side) => el("ol", { class: "cards" }, ...entries.map(([i, score]) => card(i, score, side)));
      box.append(el("p", {}, "By the mean score over all queries: the predicted change of the mean " + measure + " when the example is removed."),
        el("h2", { class: "head-help" }, "Most helpful overall"), list(index.top.help, "help"),
        el("h2", { class: "head-harm" }, "Most harmful overall"), list(index.top.harm, "harm"));
    }],
  };
  if (!index.classes) delete panels.classes;
  function pair(entry) {
    const apart = entry.d === 0 ? "The inputs are equal." : "They differ by " + percent(entry.d) + " of what two random examples differ by.";
    const act = entry.c > 0.5 ? "They push the queries the same way" : entry.c < -0.5 ? "They push the queries in opposite directions" : "Their effects on the queries differ";
    const box = el("li", { class: "pair" }, el("p", {}, apart + " " + act + " (cosine " + entry.c.toFixed(2).replace("-", "−") + ")."));
    for (const i of [entry.a, entry.b]) { const one = card(i, null, ""); box.append(el("div", { class: one.className }, ...one.children)); }
    return box;
  }
  function classes(box) {
    const C = index.classes;
    const count = C.names.length, diagonal = C.names.map((_, c) => C.matrix[c][c]);
    const columns = [["Class", C.names], ["Training examples", C.train], ["Queries", C.asked]];
    if (C.mistakes) columns.push(["Answered wrongly", C.mistakes]);
    columns.push(["Doubtful labels", C.doubtful], ["Effect on own class", diagonal]);
    box.append(el("h2", {}, "Per class"), sortable(columns),
      el("h2", {}, "Which class helps which"),
      el("p", {}, "Mean score on the queries of the class in the row of one training example of the class in the column. Blue helps, orange harms; the number says it too. Framed: a class on itself."));
    const largest = Math.max(...C.matrix.flat().map((v) => Math.abs(v ?? 0))) || 1;
    const head = el("tr", {}, el("th", { scope: "col" }, "query ↓ training →"), ...C.names.map((name) => el("th", { scope: "col", dir: "auto", title: name }, name)));
    const rows = C.names.map((name, a) => el("tr", {}, el("th", { scope: "row", dir: "auto" }, name), ...C.matrix[a].map((value, b) => {
      const cell = el("td", { class: a === b ? "same" : "" }, value === null ? "–" : signed(value));
      if (value) cell.style.background = "rgb(var(--heat-" + (good(value) ? "help" : "harm") + ") / " + (0.45 * Math.sqrt(Math.abs(value) / largest)).toFixed(3) + ")";
      return cell;
    })));
    if (count) box.append(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Which class helps which" }, el("table", { class: "data" }, el("thead", {}, head), el("tbody", {}, ...rows))));
  }
  function sortable(columns) {
    const body = el("tbody"), heads = [];
    let by = -1, down = true;
    function fill() {
      const order = columns[0][1].map((_, row) => row);
      if (by >= 0) order.sort((a, b) => {
        const [x, y] = [columns[by][1][a], columns[by][1][b]];
        const sign = typeof x === "string" ? x.localeCompare(y) : (x ?? -Infinity) - (y ?? -Infinity);
        return down ? -sign : sign;
      });
      body.replaceChildren(...order.map((row) => el("tr", {}, ...columns.map(([, values], c) => {
        const value = values[row];
        return c === 0 ? el("th", { scope: "row", dir: "auto" }, value) : el("td", {}, value === null ? "–" : Number.isInteger(value) ? whole(value) : signed(value));
      }))));
      heads.forEach((head, c) => head.setAttribute("aria-sort", c !== by ? "none" : down ? "descending" : "ascending"));
    }
    columns.forEach(([name], c) => heads.push(el("th", { scope: "col" }, el("button", { type: "button", onclick: () => {
      down = by === c ? !down : c > 0; by = c; fill();
    } }, name + " ↕"))));
    fill();
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Per class" }, el("table", { class: "data" }, el("thead", {}, el("tr", {}, ...heads)), body));
  }
  function showTraining(name) {
    const chosen = Object.hasOwn(panels, name) ? name : "labels";
    for (const tab of $("tabs").children) {
      const on = tab.dataset.name === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
    $("panel").setAttribute("aria-labelledby", "tab-" + chosen);
    $("panel").replaceChildren();
    panels[chosen][1]($("panel"));
  }
  function fillTabs() {
    const names = Object.keys(panels);
    for (const name of names) {
      const tab = el("button", { type: "button", role: "tab", id: "tab-" + name, "aria-controls": "panel", onclick: () => { location.hash = "#training/" + name; } }, panels[name][0]);
      tab.dataset.name = name;
      $("tabs").append(tab);
    }
    $("tabs").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], at = names.indexOf(document.activeElement.dataset.name);
      if (step === undefined || at < 0) return;
      event.preventDefault();
      const next = names[(at + step + names.length) % names.length];
      location.hash = "#training/" + next;
      $("tab-" + next).focus();
    });
  }

  // ------------------------------------------------------------------ views
  function start() {
    const wrong = Q.wrong ? Q.wrong.filter((one) => one === 1).length : 0, pairs = index.pairs.other.length + index.pairs.same.length;
    const box = (href, number, words) => el("a", { href }, el("b", { class: "num" }, number), words);
    const queue = index.queue.length;
    $("start").append(
      box("#queries", whole(size), size === 1 ? "query and what it rests on" : "queries and what each rests on" + (wrong ? "; " + whole(wrong) + " answered wrongly" : "")),
      queue ? box("#training/labels", whole(queue), labelled ? "training examples with the most doubtful " + LABEL + "s" : "training texts most worth a look") : "",
      box("#training/pairs", whole(pairs), labelled ? "near-duplicate or conflicting pairs" : "near-duplicate pairs"));
  }
  let first = true;
  function route() {
    const [view, rest] = (location.hash.slice(1) || "overview").split("/");
    const q = Number(rest), one = view === "q" && Number.isInteger(q) && q >= 0 && q < size;
    const known = ["overview", "queries", "training", "decisions"].includes(view) ? view : one ? "query" : "overview";
    for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== "view-" + known;
    for (const link of document.querySelectorAll("nav a")) {
      const on = link.getAttribute("href") === "#" + (known === "query" ? "queries" : known);
      if (on) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
    if (known === "query") showQuery(q); else current = -1;
    tellWhatIf();
    if (known === "queries" && !drawn) filtered();
    if (known === "training") showTraining(rest);
    if (known === "decisions") showDecisions();
    document.title = (known === "query" ? Q.name[q] : $("h-" + known).textContent) + " · " + meta.title;
    if (!first && !(known === "training" && document.activeElement.role === "tab")) $("main").focus({ preventScroll: true });
    if (!first && known !== "queries") scrollTo(0, 0);
    first = false;
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("example").open) return;
    if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    if (!$("view-queries").hidden) return moveInGrid(event);
    if ($("view-query").hidden) return;
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") { event.preventDefault(); go(event.key === "ArrowRight" ? 1 : -1); }
    if (event.key === "Escape") location.hash = "#queries";
  });
  $("more").addEventListener("click", more);
  new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting) && !$("more").hidden) more(); }, { rootMargin: "600px" }).observe($("more"));
  window.addEventListener("hashchange", route);
  fillFilters();
  arrange();
  fillTabs();
  start();
  counted();
  route();
})();
