"use strict";
// Everything shown comes from the JSON beside this script and is put in as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { models, documents, domains } = data;
const pair = models.length > 1;
const byId = (id) => document.getElementById(id);
const percent = (part, whole = 1) => {
  const value = (100 * part) / (whole || 1);
  return value > 0 && value < 1 ? "<1 %" : `${Math.round(value)} %`;
};
const count = (number) => number.toLocaleString("en");
const state = { model: 0, document: 0, layer: models[0].coverage.length >> 1, measure: "held", order: "domain", sort: "size", cluster: models.map(() => 0) };

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (name === "vars") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else if (name === "tip") node.dataset.tip = value;
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Colours: a hue for each family of neighbouring clusters (after Okabe and Ito), a lightness for each of its members.
const HUES = [[0.55, 0.13, 250], [0.76, 0.14, 72], [0.62, 0.11, 170], [0.66, 0.15, 345], [0.6, 0.16, 38], [0.79, 0.1, 222], [0.87, 0.14, 103], [0.6, 0.012, 260]];
for (const model of models) {
  model.words = model.pieces.map(visible);
  for (const [number, cluster] of model.clusters.entries()) {
    const kin = model.clusters.filter((other) => other.family === cluster.family);
    const [light, chroma, hue] = HUES[cluster.family];
    const step = Math.min(0.06, 0.3 / kin.length);
    const shade = Math.min(0.93, Math.max(0.42, light + (kin.indexOf(cluster) - (kin.length - 1) / 2) * step));
    cluster.number = number;
    cluster.colours = { "--c": `oklch(${shade.toFixed(3)} ${chroma} ${hue})`, "--on": shade > 0.64 ? "#111" : "#fff" };
    cluster.main = cluster.domains[0];
    cluster.purity = cluster.main[1] / cluster.size;
  }
}

function visible(piece) {
  const shown = piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  return shown.replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));
}
const describe = (model, number) => {
  const cluster = model.clusters[number];
  return `cluster ${number + 1}: ${domains[cluster.main[0]]} ${percent(cluster.purity)}`;
};
const badge = (cluster) => el("span", { className: "badge", vars: cluster.colours }, String(cluster.number + 1));
const heading = (model) => (pair ? el("h2", {}, model.name) : null);
const panel = (index, ...children) =>
  el("div", { className: index === state.model ? "panel shown" : "panel", "data-model": String(index) }, ...children);

// One tab stop for a group; arrow keys, Home and End move in it. `columns` makes up and down jump a row.
function roving(box, selector, columns = 1) {
  const items = [...box.querySelectorAll(selector)];
  if (!items.length) return;
  let at = Math.max(0, items.findIndex((item) => item.getAttribute("aria-pressed") === "true"));
  items.forEach((item, index) => (item.tabIndex = index === at ? 0 : -1));
  box.addEventListener("focusin", (event) => {
    const index = items.indexOf(event.target);
    if (index < 0 || index === at) return;
    items[at].tabIndex = -1;
    items[(at = index)].tabIndex = 0;
  });
  box.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -items.length, End: items.length };
    if (!(event.key in steps) || !items.includes(event.target)) return;
    event.preventDefault();
    const to = at + steps[event.key];
    const jumps = Math.abs(steps[event.key]) === items.length;
    if (!jumps && (to < 0 || to >= items.length)) return;
    items[Math.max(0, Math.min(items.length - 1, to))].focus();
  });
}

// --- clusters -------------------------------------------------------------------------------------------------------

const SORTS = {
  size: ["largest first", (a, b) => a.number - b.number],
  purity: ["most of one domain first", (a, b) => b.purity - a.purity],
  domain: ["by main domain", (a, b) => a.main[0] - b.main[0] || a.number - b.number],
  family: ["alike together", (a, b) => a.family - b.family || a.number - b.number],
};

function figures(model) {
  const sizes = domains.map((_, domain) => model.clusters.reduce((sum, cluster) => sum + (cluster.domains.find(([each]) => each === domain) || [0, 0])[1], 0));
  const facts = [
    [percent(model.domainShare), `of tokens lie in the main domain of their cluster; the largest domain has ${percent(Math.max(...sizes), model.tokens)} of all`],
    [percent(model.wordShare), "are one of their cluster’s ten commonest tokens"],
  ];
  const ratios = model.coverage.filter((layer) => layer.other > 0 && layer.same !== null).map((layer) => layer.same / layer.other);
  if (ratios.length) {
    const mean = ratios.reduce((sum, ratio) => sum + ratio, 0) / ratios.length;
    facts.push([`${mean.toFixed(1)} ×`, "as many experts shared by two documents of a domain as by two of different ones"]);
  }
  return el("dl", { className: "figures" }, ...facts.map(([value, what]) => el("div", {}, el("dt", {}, what), el("dd", { className: "num" }, value))));
}

function showClusters() {
  const view = byId("clusters");
  const panels = models.map((model, index) => {
    const list = el("ol", { className: "list", "aria-label": `Clusters of ${model.name}` });
    const sort = el("select", { "aria-label": "Order of the clusters", on: { change: () => { state.sort = sort.value; showClusters(); view.querySelectorAll("select")[index].focus(); } } });
    for (const [key, [label]] of Object.entries(SORTS)) sort.append(el("option", { value: key, selected: key === state.sort }, label));
    for (const cluster of [...model.clusters].sort(SORTS[state.sort][1])) list.append(el("li", {}, clusterRow(model, index, cluster)));
    roving(list, "button");
    return panel(
      index, heading(model), figures(model),
      el("div", { className: "split" },
        el("div", {}, el("div", { className: "head" }, el("h3", {}, `${model.clusters.length} clusters`), sort),
          el("p", { className: "columns-head" }, el("span", {}, "main domain and its share"), el("span", {}, "of all tokens")), list),
        el("article", { className: "detail", "aria-live": "polite" })),
    );
  });
  view.replaceChildren(el("div", { className: "panels" }, ...panels));
  models.forEach((_, index) => selectCluster(index, state.cluster[index]));
}

function clusterRow(model, index, cluster) {
  const [domain] = cluster.main;
  return el("button",
    { type: "button", "data-cluster": String(cluster.number), on: { click: () => selectCluster(index, cluster.number) } },
    badge(cluster),
    el("span", {}, `${domains[domain]} `, el("span", { className: "soft num" }, percent(cluster.purity))),
    el("span", { className: "soft num" }, percent(cluster.size, model.tokens)),
    el("span", { className: "words" }, cluster.typical.slice(0, 8).map(([piece]) => model.words[piece]).join("  ")));
}

function selectCluster(index, number) {
  state.cluster[index] = number;
  const model = models[index];
  const box = byId("clusters").querySelector(`.panel[data-model="${index}"]`);
  for (const button of box.querySelectorAll(".list button")) button.setAttribute("aria-pressed", String(Number(button.dataset.cluster) === number));
  box.querySelector(".detail").replaceChildren(...clusterDetail(model, index, model.clusters[number]));
}

function clusterDetail(model, index, cluster) {
  const rest = cluster.domains.slice(6);
  const mix = cluster.domains.slice(0, 6).map(([domain, size]) => [domains[domain], size]);
  if (rest.length) mix.push([`${rest.length} more`, rest.reduce((sum, [, size]) => sum + size, 0)]);
  const kin = model.clusters.filter((other) => other.family === cluster.family && other !== cluster);
  const parts = [
    el("div", { className: "head" },
      el("h3", {}, badge(cluster), `Cluster ${cluster.number + 1}`),
      el("span", { className: "soft num" }, `${count(cluster.size)} tokens, ${percent(cluster.size, model.tokens)} of all`)),
    el("h4", {}, "Domains of its tokens"),
    el("ul", { className: "bars" }, ...mix.map(([name, size]) =>
      el("li", {},
        el("span", {}, name),
        el("i", { vars: { "--v": String((100 * size) / cluster.size) }, tip: `${name}: ${count(size)} of ${count(cluster.size)} tokens` }), el("span", { className: "soft num" }, percent(size, cluster.size))))),
    el("h4", {}, "Typical tokens"),
    el("div", { className: "chips" }, ...cluster.typical.map(([piece, size, all]) =>
      el("span", { className: "chip", tip: `${count(size)} here, ${count(all)} in all clusters` }, model.words[piece], el("small", { className: "num" }, count(size))))),
    el("h4", {}, "In context, nearest to the centre first"),
    el("ul", { className: "quotes" }, ...cluster.examples.map(([doc, position]) => quote(model, index, cluster, doc, position))),
  ];
  if (kin.length) {
    parts.push(el("h4", {}, "Routed most alike"), el("div", { className: "legend" }, ...kin.map((other) =>
      el("button", { type: "button", tip: describe(model, other.number), on: { click: () => selectCluster(index, other.number) } }, badge(other), domains[other.main[0]]))));
  }
  return parts;
}

function quote(model, index, cluster, doc, position) {
  const { pieces, clusters } = model.documents[doc];
  const line = el("p");
  for (let at = Math.max(0, position - 14); at < Math.min(pieces.length, position + 15); at++) {
    const text = model.pieces[pieces[at]].replace(/\s*\n\s*/g, " ⏎ ");
    line.append(at === position ? el("mark", {}, text) : el("span", { className: clusters[at] === cluster.number ? "kin" : "" }, text));
  }
  const open = el("button", { type: "button", className: "link", on: { click: () => openDocument(doc, index, position) } },
    `${domains[documents[doc].domain]} · ${documents[doc].name}`);
  return el("li", { vars: cluster.colours }, line, open);
}

// --- documents ------------------------------------------------------------------------------------------------------

function showDocuments() {
  const panels = models.map((model, index) => {
    const strips = el("div", { className: "strips", role: "group", "aria-label": `Documents as ${model.name} routes them` });
    domains.forEach((domain, number) => {
      const rows = documents.map((_, doc) => doc).filter((doc) => documents[doc].domain === number);
      if (rows.length) strips.append(el("div", { className: "domain" }, el("b", {}, domain), ...rows.map((doc) => strip(model, doc))));
    });
    roving(strips, "button");
    return panel(
      index, heading(model),
      el("div", { className: "split" },
        el("div", {}, el("div", { className: "head" }, el("h3", {}, `${documents.length} documents, a colour for each token’s cluster`)), strips),
        el("article", { className: "detail" })),
    );
  });
  byId("documents").replaceChildren(
    el("p", { className: "note" }, "One strip is one document, first token to last; strips are grouped by domain. Shades of one hue are clusters that are routed alike. ",
      pair ? "The two models’ colours have nothing to do with each other." : ""),
    el("div", { className: "panels" }, ...panels));
  selectDocument(state.document);
}

function strip(model, doc) {
  const { clusters } = model.documents[doc];
  const canvas = el("canvas", { width: clusters.length, height: 1 });
  const ink = canvas.getContext("2d");
  clusters.forEach((cluster, at) => {
    ink.fillStyle = model.clusters[cluster].colours["--c"];
    ink.fillRect(at, 0, 1, 1);
  });
  const top = tally(clusters).slice(0, 3).map(([cluster, size]) => `${describe(model, cluster)}, ${percent(size, clusters.length)} of its tokens`);
  const name = `${domains[documents[doc].domain]} · ${documents[doc].name}`;
  return el("button", { type: "button", "data-document": String(doc), "aria-label": `${name}; mostly ${top[0]}`, tip: `${name}\n${top.join("\n")}`, on: { click: () => selectDocument(doc) } }, canvas);
}

function tally(values) {
  const sizes = new Map();
  for (const value of values) sizes.set(value, (sizes.get(value) || 0) + 1);
  return [...sizes].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

function selectDocument(doc, model = null, position = null) {
  state.document = doc;
  models.forEach((each, index) => {
    const box = byId("documents").querySelector(`.panel[data-model="${index}"]`);
    for (const button of box.querySelectorAll(".strips button")) button.setAttribute("aria-pressed", String(Number(button.dataset.document) === doc));
    box.querySelector(".detail").replaceChildren(...reader(each, index, doc, index === model ? position : null));
  });
}

function reader(model, index, doc, position) {
  const { pieces, clusters } = model.documents[doc];
  const text = el("div", { className: "reader", role: "group", "aria-label": "Text; arrow keys move by token, Enter opens its cluster" });
  pieces.forEach((piece, at) => {
    const cluster = model.clusters[clusters[at]];
    const open = () => { selectCluster(index, cluster.number); setModel(index); showView("clusters", true); };
    const key = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } };
    text.append(el("span",
      { className: at === position ? "here" : "", "data-cluster": String(cluster.number), role: "button", vars: cluster.colours, tip: `${describe(model, cluster.number)}\ntoken ${at + 1} of ${pieces.length}`, on: { click: open, keydown: key } },
      model.pieces[piece]));
  });
  roving(text, "span");
  const legend = el("div", { className: "legend" });
  for (const [number, size] of tally(clusters).slice(0, 10)) {
    const button = el("button", { type: "button", "aria-pressed": "false", tip: describe(model, number), on: { click: () => highlight(text, legend, button, number) } },
      badge(model.clusters[number]), el("span", { className: "num" }, percent(size, clusters.length)));
    legend.append(button);
  }
  return [
    el("div", { className: "head" }, el("h3", {}, domains[documents[doc].domain]),
      el("span", { className: "soft num" }, `${clusters.length} tokens in ${tally(clusters).length} clusters`)),
    el("p", { className: "soft" }, documents[doc].name), legend, text,
  ];
}

function highlight(text, legend, button, number) {
  const on = button.getAttribute("aria-pressed") !== "true";
  for (const other of legend.children) other.setAttribute("aria-pressed", String(on && other === button));
  text.classList.toggle("focused", on);
  for (const token of text.children) token.classList.toggle("on", on && Number(token.dataset.cluster) === number);
}

function openDocument(doc, model, position) {
  setModel(model);
  showView("documents", true);
  selectDocument(doc, model, position);
  const panelBox = byId("documents").querySelector(`.panel[data-model="${model}"]`);
  panelBox.querySelector(".strips button[aria-pressed=true]").scrollIntoView({ block: "nearest" });
  panelBox.querySelector(".reader .here").scrollIntoView({ block: "center" });
}

// --- experts --------------------------------------------------------------------------------------------------------

const MEASURES = { held: "documents", mass: "probability" };
const ORDERS = { domain: "main domain", index: "number" };

function showExperts() {
  const panels = el("div", { className: "panels" });
  const draw = (focused = null) => {
    panels.replaceChildren(...models.map((model, index) => panel(index, heading(model), ...heatMap(model, index, draw))));
    if (focused !== null) panels.querySelector(`.panel[data-model="${focused}"] .layers [aria-pressed=true]`).focus();
  };
  byId("experts").replaceChildren(
    el("p", { className: "note" }, "Each row is a domain, each column an expert. Domains that keep to experts of their own make blocks; domains that share experts overlap."),
    el("div", { className: "controls" }, choice("measure", "Share of", MEASURES, draw), choice("order", "Experts by", ORDERS, draw)),
    panels);
  draw();
}

function choice(field, label, options, draw) {
  const group = el("div", { className: "choice", role: "group", "aria-label": label });
  for (const [key, words] of Object.entries(options)) {
    const press = () => { state[field] = key; for (const other of group.children) other.setAttribute("aria-pressed", String(other.dataset.key === key)); draw(); };
    group.append(el("button", { type: "button", "data-key": key, "aria-pressed": String(state[field] === key), on: { click: press } }, words));
  }
  return el("div", { className: "choose" }, el("span", {}, label), group);
}

function heatMap(model, index, draw) {
  const layer = model.coverage[Math.min(state.layer, model.coverage.length - 1)];
  const rows = layer[state.measure];
  const most = state.measure === "held" ? 100 : Math.max(...rows.flat());
  const experts = rows[0].map((_, expert) => expert);
  const best = experts.map((expert) => rows.reduce((top, row, domain) => (row[expert] > rows[top][expert] ? domain : top), 0));
  if (state.order === "domain") experts.sort((a, b) => best[a] - best[b] || rows[best[b]][b] - rows[best[a]][a] || a - b);
  const table = el("table", { "aria-label": `Share of ${MEASURES[state.measure]}, layer ${layer.layer} of ${model.name}`, vars: { "--columns": String(experts.length) } });
  table.append(el("colgroup", {}, el("col", { className: "names" }), el("col", { span: experts.length })));
  const body = el("tbody");
  rows.forEach((row, domain) => {
    body.append(el("tr", {}, el("th", { scope: "row", tip: `${domains[domain]}: ${data.documentsOf[domain]} documents` }, domains[domain]), ...experts.map((expert) => {
      const words = `${domains[domain]}, expert ${expert}\nin the pools of ${layer.held[domain][expert]} % of ${data.documentsOf[domain]} documents\n${(layer.mass[domain][expert] / 100).toFixed(2)} % of gate probability`;
      return el("td", { vars: { "--v": ((100 * row[expert]) / (most || 1)).toFixed(1) }, tip: words, "aria-label": words });
    })));
  });
  table.append(body);
  roving(table, "td", experts.length);
  const top = state.measure === "held" ? "100 % of documents" : `${(most / 100).toFixed(1)} %`;
  return [
    layers(model, index, draw), overlap(layer), el("div", { className: "heat" }, table),
    el("p", { className: "scale" }, "0", el("i"), top, el("span", {}, `· ${experts.length} routed experts across, ${rows.length} domains down`)),
  ];
}

// A chart that is also the choice of the layer: how much of their pools two documents have in common.
function layers(model, index, draw) {
  const shown = Math.min(state.layer, model.coverage.length - 1);
  const chart = el("div", { className: "layers", role: "group", "aria-label": `Layers of ${model.name}` });
  model.coverage.forEach((layer, at) => {
    const words = `Layer ${layer.layer}\nsame domain: ${layer.same === null ? "no pairs" : percent(layer.same)} in common\ndifferent domains: ${layer.other === null ? "no pairs" : percent(layer.other)}`;
    const bars = el("span", { className: "columns" }, el("i", { vars: { "--v": String(100 * layer.same) } }), el("i", { className: "other", vars: { "--v": String(100 * layer.other) } }));
    chart.append(el("button", { type: "button", "aria-pressed": String(at === shown), "aria-label": words, tip: words, on: { click: () => { state.layer = at; draw(index); } } }, bars, el("span", { className: "num" }, String(layer.layer))));
  });
  roving(chart, "button");
  const key = el("p", { className: "key" }, el("b", {}, "Layer"),
    el("span", {}, el("i"), "pools in common, same domain"), el("span", {}, el("i", { className: "other" }), "different domains"));
  return el("div", { className: "choose-layer" }, key, chart);
}

function overlap(layer) {
  const note = el("p", { className: "note" }, `Layer ${layer.layer}, pools of ${layer.pool} experts. `);
  if (layer.same === null || layer.other === null) return note;
  const ratio = layer.other > 0 ? `, ${(layer.same / layer.other).toFixed(1)} times as many` : "";
  note.append("Two documents of one domain have ", el("b", {}, percent(layer.same)), " of their pools in common, two of different domains ", el("b", {}, percent(layer.other)), `${ratio}.`);
  return note;
}

// --- the page -------------------------------------------------------------------------------------------------------

const VIEWS = ["clusters", "documents", "experts"];

function showView(name, focus = false) {
  for (const view of VIEWS) {
    const tab = byId(`tab-${view}`);
    byId(view).hidden = view !== name;
    tab.setAttribute("aria-selected", String(view === name));
    tab.tabIndex = view === name ? 0 : -1;
  }
  if (focus) { byId(`tab-${name}`).focus({ preventScroll: true }); window.scrollTo(0, 0); }
  history.replaceState(null, "", `#view=${name}`);
}

function setModel(index) {
  state.model = index;
  for (const box of document.querySelectorAll(".panel")) box.classList.toggle("shown", Number(box.dataset.model) === index);
  [...byId("models").children].forEach((button, at) => button.setAttribute("aria-pressed", String(at === index)));
}

function start() {
  document.body.classList.toggle("pair", pair);
  byId("lede").textContent = data.lede;
  byId("method").append(...data.method.flatMap(([term, words]) => [el("dt", {}, term), el("dd", {}, words)]));
  for (const view of VIEWS) byId(`tab-${view}`).addEventListener("click", () => showView(view));
  byId("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) showView(VIEWS[(VIEWS.findIndex((view) => !byId(view).hidden) + step + VIEWS.length) % VIEWS.length], true);
  });
  if (pair) {
    byId("models").hidden = false;
    byId("models").append(...models.map((model, index) => el("button", { type: "button", on: { click: () => setModel(index) } }, model.name)));
  }
  showClusters();
  showDocuments();
  showExperts();
  setModel(0);
  const asked = location.hash.replace("#view=", "");
  showView(VIEWS.includes(asked) ? asked : "clusters");
}

const tip = byId("tip");
function showTip(event) {
  const target = event.target.closest ? event.target.closest("[data-tip]") : null;
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.dataset.tip;
  const at = target.getClientRects()[0] || target.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left), window.innerWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : at.bottom + 8}px`;
}
document.addEventListener("pointerover", showTip);
document.addEventListener("focusin", (event) => { if (event.target.matches(":focus-visible")) showTip(event); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
start();
