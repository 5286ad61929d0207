"use strict";
/* Texts token by token, for report.js. As there, what comes from data is put in place as text, never as markup. */
const ptifTexts = ({ el, isolated, brief, whole, signed, plain, tone, index, example, look, ticks, see, lost }) => {
  const STEPS = 99, WHOLE = 120, SHOWN = 90, AROUND = 10;
  const measure = index.loss ? "loss" : "measure";

  /** Which tokens are taught, one yes or no per token. */
  function taughtOf(record) {
    const taught = new Array(record.p.length).fill(false);
    for (const [first, last] of record.g) taught.fill(true, first, last);
    return taught;
  }
  /** Which tokens a cut text shows: those around its strongest ones, else the beginning of what is taught. */
  function around(record, values) {
    const size = record.p.length, shown = new Array(size).fill(size <= WHOLE);
    if (size <= WHOLE) return shown;
    let left = SHOWN;
    const open = (from, to) => { for (let at = Math.max(0, from); at < Math.min(size, to); at++) if (!shown[at]) { shown[at] = true; left--; } };
    const order = values ? [...values.keys()].filter((at) => Math.abs(values[at]) > 1).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])) : [];
    for (const at of order) { if (left <= 0) break; if (!shown[at]) open(at - AROUND, at + AROUND + 1); }
    const begin = record.g.length ? record.g[0][0] - AROUND : 0;
    if (left > 0) open(begin, begin + left);
    return shown;
  }
  /** The tokens of a text as blocks, one per turn. `values` are whole numbers from -99 to 99, positive for help. */
  function blocks(record, values, strongest, all) {
    const box = el("div", { class: "tokens", dir: "auto" }), taught = taughtOf(record), shown = all ? null : around(record, values);
    const turns = new Map(record.r), size = record.p.length;
    const starts = [...turns.keys(), size], empty = (at) => shown && !shown.slice(at, starts.find((one) => one > at)).some((one) => one);
    const bare = values ? " plain" : "";
    let block = null, run = "", kind = "", gap = false;
    const flush = () => { if (run) block.append(el("span", { class: kind }, run)); run = ""; };
    const start = (role) => {
      flush();
      gap = false;
      block = el("div", { class: "turn" }, role === undefined ? null : isolated(role, "role"));
      box.append(block);
    };
    if (!turns.has(0) || empty(0)) start(undefined);
    for (let at = 0; at < size; at++) {
      if (turns.has(at) && !empty(at)) start(turns.get(at));
      if (at === 0 && record.cut[0]) block.append("… ");
      if (shown && !shown[at]) { if (!gap) { flush(); block.append(el("span", { class: "gap" }, " … ")); } gap = true; continue; }
      gap = false;
      const value = values ? values[at] : 0, own = taught[at] ? "taught" + bare : "context";
      if (Math.abs(value) < 2) {
        if (kind !== own) { flush(); kind = own; }
        run += record.p[at];
        continue;
      }
      flush();
      const side = value > 0 ? "helps" : value < -4 ? "harms" : "", share = Math.pow(Math.abs(value) / STEPS, 0.7).toFixed(3);
      const title = strongest ? signed(((index.loss ? 1 : -1) * value * strongest) / STEPS) : null;
      const token = el("span", { class: "token " + side, title }, record.p[at]);
      token.style.background = "rgb(var(--heat-" + (value > 0 ? "help" : "harm") + ") / calc(var(--heat-most) * " + share + "))";
      block.append(token);
    }
    flush();
    if (record.cut[1]) block.append(" …");
    return box;
  }
  /** A text that is cut around what matters, with a button that shows all of it. */
  function text(record, values, strongest, label) {
    const box = el("div", { class: "words text-box", tabindex: "0", role: "region", "aria-label": "Text" + (label ? " of " + label : "") }), size = record.p.length;
    let all = size <= WHOLE;
    const missing = record.cut[0] + record.cut[1];
    const button = el("button", { type: "button", class: "more", "aria-label": label, onclick: () => { all = !all; draw(); } });
    const left = missing ? el("p", { class: "faint" }, whole(missing) + " more tokens are not on this page.") : null;
    function draw() {
      button.textContent = all ? "Show less" : "Show all " + whole(size) + " tokens";
      button.setAttribute("aria-label", button.textContent + (label ? " of " + label : ""));
      button.setAttribute("aria-expanded", String(all));
      box.replaceChildren(blocks(record, values, strongest, all), ...(size > WHOLE ? [button] : []), ...(left && all ? [left] : []));
    }
    draw();
    return box;
  }
  const colours = (record, key) => (record.v && record.v[key]) || null;
  const sourceName = (record) => (index.sources && record.f !== undefined ? index.sources.names[record.f] : "");

  /** The query, whose tokens are coloured by one of the texts shown, or by all that help most. */
  function asked(record, name) {
    const box = el("div", { class: "asked" }), caption = el("p", { class: "faint" });
    function colour(i) {
      const own = colours(record, i === null ? -1 : i);
      caption.textContent = !own ? "" : i === null ? "Coloured by the texts below that help most, together." : "Coloured by training example " + i + " alone.";
      box.replaceChildren(text(record, own, 0, name), caption);
    }
    colour(null);
    return { box, colour };
  }
  /** One training text on a query's page. */
  function card(i, score, side, q, queryRecord, colour) {
    const body = el("div", { class: "doc-body" }, el("div", { class: "see" })), chips = el("span", { class: "chips" });
    const open = el("button", { type: "button", class: "link", "aria-label": "Look at training example " + i, onclick: () => look(i, q) }, "#" + i);
    const made = el("li", { class: "card doc " + side }, el("div", { class: "doc-head" }, open, el("span", { class: "num " + tone(score) }, signed(score)), chips), body, ticks(i));
    const ready = example(i).catch(() => ({ ...lost, i })).then((record) => {
      const source = sourceName(record), name = "training example " + i;
      if (source) chips.append(isolated(brief(source, 40), "source"));
      if (record.n) chips.append(isolated(brief(record.n, 60), "faint"));
      if (record.l) chips.append(isolated(brief(record.l, 40), "label"));
      body.replaceChildren(record.p ? text(record, colours(record, q), queryRecord.x, name) : see(record, name, true));
      if (colours(queryRecord, i)) {
        const button = el("button", { type: "button", class: "link by", "aria-pressed": "false", onclick: () => {
          const on = button.getAttribute("aria-pressed") !== "true";
          for (const other of document.querySelectorAll("button.by")) other.setAttribute("aria-pressed", "false");
          button.setAttribute("aria-pressed", String(on));
          colour(on ? i : null);
        } }, "Colour the query by it");
        chips.append(button);
      }
      made.holds = { source: record.f, text: ["#" + i, record.n || "", source, record.p ? record.p.join("") : String(record.t)].join("\n").toLowerCase() };
    });
    return { made, ready };
  }
  /** Both lists of a query, with a filter over them. */
  function lists(q, record, colour, heads) {
    const wanted = { words: "", source: "" }, cards = [], count = el("p", { class: "faint", role: "status" });
    const filter = () => {
      let seen = 0;
      for (const one of cards) {
        const holds = one.made.holds;
        const fits = !holds || ((wanted.source === "" || String(holds.source) === wanted.source) && holds.text.includes(wanted.words));
        one.made.hidden = !fits;
        seen += fits ? 1 : 0;
      }
      count.textContent = seen === cards.length ? "" : whole(seen) + " of " + whole(cards.length) + " texts";
    };
    const list = (entries, side) => el("ol", { class: "cards docs" }, ...entries.map(([i, score]) => {
      const one = card(i, score, side, q, record, colour);
      one.ready.then(filter);
      cards.push(one);
      return one.made;
    }));
    const form = el("form", { class: "filters", role: "search" });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(el("label", { class: "wide" }, "Search these texts", el("input", { type: "search", oninput: (event) => { wanted.words = event.target.value.trim().toLowerCase(); filter(); } })));
    if (index.sources && index.sources.names.length > 1 && index.sources.names.length <= 200) {
      const box = el("select", { onchange: (event) => { wanted.source = event.target.value; filter(); } }, el("option", { value: "" }, "all"));
      index.sources.names.forEach((name, at) => box.append(el("option", { value: String(at) }, brief(name, 40))));
      form.append(el("label", {}, "Source", box));
    }
    return [form, count, legend(record), heads.help, list(record.help, "help"), heads.harm, list(record.harm, "harm")];
  }
  function legend(record) {
    const shared = record.x ? ["Colours: a token's share of the score. ", el("span", { class: "token helps swatch-help" }, "Blue"), " helps, ", el("span", { class: "token harms swatch-harm" }, "orange and underlined"), " harms; the darkest is " + plain(record.x) + ". "] : [];
    return el("p", { class: "legend" }, ...shared, el("span", { class: "taught" + (record.x ? " plain" : "") }, record.x ? "Dark" : "Shaded"), " text is what the model was taught; ", el("span", { class: "context" }, "grey"), " is context.");
  }
  /** What each source does to a query, all its examples together. */
  function bySource(record) {
    if (!index.sources || !record.by || index.sources.names.length < 2) return "";
    const largest = Math.max(...record.by.map(([, sum]) => Math.abs(sum))) || 1;
    const rows = record.by.map(([at, sum]) => {
      const fill = el("span", { class: "fill " + (tone(sum) === "harm-word" ? "harm-fill" : "") });
      fill.style.width = (Math.abs(sum) / largest) * 100 + "%";
      const name = index.sources.names[at];
      return el("div", {}, el("span", { class: "name", dir: "auto", title: name + ", " + whole(index.sources.counts[at]) + " examples" }, name), el("span", { class: "track" }, fill), el("span", { class: "num " + tone(sum) }, signed(sum)));
    });
    return el("div", {}, el("h3", {}, "By source"), el("div", { class: "said sources" }, ...rows),
      el("p", { class: "faint" }, "Predicted change of the " + measure + " if all of a source were removed, to first order" + (index.held < index.n ? "; of the examples that are held." : ".")));
  }
  return { asked, lists, bySource, text, colours, sourceName };
};
