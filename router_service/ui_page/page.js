"use strict";
// Everything from the router is put into the document as text.
const EVERY_MS = 2000, WINDOW_S = 300, ROW_PX = 11;
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let state = null, receivedMs = 0;

const percent = (part, whole) => (whole ? `${Math.round((1000 * part) / whole) / 10} %` : "–");
const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
const sum = (values) => values.reduce((total, value) => total + value, 0);

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function drawing(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// --- figures and status ---

function showFigures() {
  const total = (name) => sum(state.samples.map((sample) => sample[name]));
  const seconds = total("seconds") || 1;
  const workers = state.workers.filter((worker) => worker.state === "ready").length;
  const all = sum(state.model.routed_per_layer);
  $("version").textContent = state.version;
  $("model").textContent = state.model.name;
  document.title = `${state.model.name} · expert-pager`;
  $("status").className = `status ${workers ? "ok" : "bad"}`;
  $("status-text").textContent = `${workers} of ${plural(state.workers.length + state.workers_left_out, "worker")} ready`;
  $("hit-rate").textContent = percent(total("experts_hit"), total("experts_hit") + total("experts_missed"));
  $("from-disk").textContent = `${bytes(total("bytes_from_disk") / seconds)}/s`;
  $("from-host").textContent = `${bytes(total("bytes_from_host") / seconds)}/s`;
  $("load").textContent = `${sum(state.workers.map((each) => each.running))}, ${sum(state.workers.map((each) => each.waiting))}`;
  $("resident").textContent = `${sum(state.workers.map(held))} of ${plural(sum(state.workers.map((each) => each.slots)), "slot")}`;
  $("resident").title = `the model has ${all} experts`;
}

// --- charts: what each sample spans, from the left edge, five minutes ago, to the right ---

const at = (unixS) => Math.max(0, WINDOW_S - (state.now_unix_s - unixS));
const spans = () => state.samples.map((sample) => [at(sample.end_unix_s - sample.seconds), at(sample.end_unix_s), sample]);

function chart(id, label, shapes) {
  const svg = $(id).querySelector("svg");
  const lines = [0.5, 40, 79.5].map((y) => drawing("path", { class: "grid", d: `M0 ${y}H${WINDOW_S}` }));
  svg.replaceChildren(...lines, ...shapes);
  svg.setAttribute("aria-label", label);
}

function showHits() {
  let path = "", last = null;
  for (const [start, end, sample] of spans()) {
    const asked = sample.experts_hit + sample.experts_missed;
    const y = 79 - 78 * (sample.experts_hit / (asked || 1));
    if (asked) path += `${last === null ? `M${start}` : `V${y}M${start}`} ${y}H${end}`;
    last = asked ? y : null;
  }
  chart("hits", `Hit rate of the last five minutes: ${$("hit-rate").textContent}`, path ? [drawing("path", { class: "rate", d: path })] : []);
}

function showBandwidth() {
  const rate = (sample, tier) => sample[`bytes_from_${tier}`] / (sample.seconds || 1);
  const most = Math.max(1, ...state.samples.map((sample) => rate(sample, "disk") + rate(sample, "host")));
  const bars = spans().flatMap(([start, end, sample]) => {
    let y = 80;
    return ["disk", "host"].map((tier) => {
      const height = (79 * rate(sample, tier)) / most;
      y -= height;
      return drawing("rect", { class: tier, x: start, y, width: Math.max(0, end - start - 0.4), height });
    });
  });
  $("bandwidth").querySelector(".top").textContent = most > 1 ? `${bytes(most)}/s` : "";
  chart("bandwidth", `Paged in: ${$("from-disk").textContent} from disk, ${$("from-host").textContent} from host memory`, bars);
}

const READOUTS = {
  hits: (sample) => percent(sample.experts_hit, sample.experts_hit + sample.experts_missed),
  bandwidth: (sample) =>
    `${bytes(sample.bytes_from_disk / (sample.seconds || 1))}/s disk, ${bytes(sample.bytes_from_host / (sample.seconds || 1))}/s host`,
};

for (const [id, read] of Object.entries(READOUTS)) {
  const svg = $(id).querySelector("svg"), readout = $(id).querySelector(".readout");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (WINDOW_S * (event.clientX - box.left)) / box.width;
    const found = spans().find(([start, end]) => start <= x && x <= end);
    readout.textContent = found ? `${Math.round(WINDOW_S - found[1])} s ago: ${read(found[2])}` : "";
  });
  svg.addEventListener("pointerleave", () => (readout.textContent = ""));
}

// --- residency ---

const holds = (worker, layer, expert) => (parseInt(worker.resident[layer].substr(2 * (expert >> 3), 2), 16) >> (expert & 7)) & 1;
const held = (worker) => sum(state.model.routed_per_layer.map((routed, layer) => sum(Array.from({ length: routed }, (_, expert) => holds(worker, layer, expert)))));

function mapOf(key) {
  const found = [...$("maps").children].find((card) => card.dataset.key === key);
  if (found) return found;
  const card = element("section", undefined, "card"), head = element("div", undefined, "head"), map = element("div", undefined, "map");
  card.dataset.key = key;
  head.append(element("h3"), element("p", "", "soft"), element("p", "", "readout"));
  const canvas = element("canvas");
  canvas.setAttribute("role", "img");
  map.append(element("div", undefined, "layers"), canvas, element("p", undefined, "axis"));
  card.append(head, map);
  canvas.addEventListener("pointermove", (event) => tellCell(card, canvas, event));
  canvas.addEventListener("pointerleave", () => (card.querySelector(".readout").textContent = ""));
  return card;
}

function tellCell(card, canvas, event) {
  const box = canvas.getBoundingClientRect(), routed = state.model.routed_per_layer;
  const layer = Math.floor((routed.length * (event.clientY - box.top)) / box.height);
  const expert = Math.floor((Math.max(...routed) * (event.clientX - box.left)) / box.width);
  if (!(expert >= 0 && expert < routed[layer])) return;
  const workers = state.workers.filter((worker) => !card.dataset.key || worker.id === card.dataset.key);
  const count = sum(workers.map((worker) => holds(worker, layer, expert)));
  const where = card.dataset.key ? (count ? "in a slot" : "not in a slot") : `on ${plural(count, "worker")}`;
  card.querySelector(".readout").textContent = `layer ${layer}, expert ${expert}: ${where}`;
}

function draw(canvas, workers) {
  const routed = state.model.routed_per_layer, columns = Math.max(1, ...routed), colours = getComputedStyle(document.documentElement);
  const ratio = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
  canvas.style.height = `${routed.length * ROW_PX}px`;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(routed.length * ROW_PX * ratio);
  const wide = canvas.width / columns, high = canvas.height / routed.length;
  const gap = wide >= 5 ? 1 : 0;
  const edge = (index, size) => Math.round(index * size);
  for (const [layer, experts] of routed.entries()) {
    for (let expert = 0; expert < experts; expert++) {
      const x = edge(expert, wide), y = edge(layer, high);
      const box = [x, y, edge(expert + 1, wide) - x - gap, edge(layer + 1, high) - y - 1];
      pen.globalAlpha = 1;
      pen.fillStyle = colours.getPropertyValue("--absent");
      pen.fillRect(...box);
      pen.globalAlpha = sum(workers.map((worker) => holds(worker, layer, expert))) / workers.length;
      pen.fillStyle = colours.getPropertyValue("--held");
      pen.fillRect(...box);
    }
  }
}

function showMap(card, title, note, workers) {
  const routed = state.model.routed_per_layer, number = sum(workers.map(held));
  card.querySelector("h3").textContent = title;
  card.querySelector(".soft").textContent = note;
  card.querySelector(".layers").replaceChildren(element("span", "0"), element("span", String(routed.length - 1)));
  card.querySelector(".axis").replaceChildren(element("span", "expert 0"), element("span", String(Math.max(...routed) - 1)));
  const canvas = card.querySelector("canvas");
  canvas.setAttribute("aria-label", `${title}: ${plural(number, "expert")} in device slots, ${plural(routed.length, "layer")} by experts`);
  draw(canvas, workers);
}

function showMaps() {
  const keys = state.workers.map((worker) => worker.id), several = keys.length > 1;
  $("maps").replaceChildren(...(several ? ["", ...keys] : keys).map(mapOf));
  if (several) showMap(mapOf(""), "All workers", "the deeper, the more of them hold it", state.workers);
  for (const worker of state.workers) {
    const speed = worker.page_in_bytes_per_s ? `, an expert pages in at ${bytes(worker.page_in_bytes_per_s)}/s` : "";
    const facts = `${worker.state}${worker.remote ? ", of another router" : ""}, ${held(worker)} of ${plural(worker.slots, "slot")}, ${worker.running} running, ${worker.waiting} waiting${speed}`;
    showMap(mapOf(worker.id), worker.id, facts, [worker]);
  }
  $("workers-left-out").hidden = !state.workers_left_out;
  $("workers-left-out").textContent = `${plural(state.workers_left_out, "more worker")} not shown.`;
}

// --- pools ---

function poolName(pool) {
  if (pool.digest) return pool.digest.slice(0, 12) + (pool.is_expected ? " (expected)" : "");
  return pool.size === "full" ? "all experts" : "not chosen yet";
}

function inSlots(pool) {
  const best = Object.entries(pool.resident).sort((one, other) => other[1] - one[1])[0];
  if (!best) return "–";
  return `${best[1]} of ${pool.experts}${state.workers.length > 1 ? ` on ${best[0]}` : ""}`;
}

function showPools() {
  const rows = state.pools.map((pool) => {
    const cells = {
      Pool: poolName(pool), Tenants: pool.tenants, Size: pool.size, Live: pool.live, Answers: pool.answers,
      "Hit rate": percent(pool.experts_hit, pool.experts_hit + pool.experts_missed),
      Paged: pool.answers ? bytes(pool.bytes_paged) : "–", "In slots": inSlots(pool),
    };
    const row = element("tr", undefined, pool.live ? "live" : "");
    row.append(...Object.entries(cells).map(([label, text]) => {
      const cell = element("td", String(text), label === "Pool" && pool.digest ? "digest" : "");
      cell.dataset.label = label;
      return cell;
    }));
    return row;
  });
  $("pools").tBodies[0].replaceChildren(...rows);
  $("pools").hidden = !rows.length;
  $("no-pools").hidden = rows.length > 0;
  $("pools-left-out").hidden = !state.pools_left_out;
  $("pools-left-out").textContent = `${plural(state.pools_left_out, "more pool")} not shown.`;
}

// --- asking ---

function show() {
  if (!state) return;
  $("main").hidden = false;
  showFigures();
  showHits();
  showBandwidth();
  showMaps();
  showPools();
  document.body.dataset.shown = state.now_unix_s;
}

async function ask() {
  if (document.visibilityState === "hidden") return;
  try {
    const answer = await fetch("/ui/state.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    state = await answer.json();
    receivedMs = performance.now();
    show();
  } catch {
    const ago = state ? `for ${Math.round((performance.now() - receivedMs) / 1000)} s` : "yet";
    $("status").className = "status bad";
    $("status-text").textContent = `The router has not answered ${ago}; what is shown is old.`;
  }
}

async function forever() {
  for (;;) {
    await ask();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

window.addEventListener("resize", show);
document.addEventListener("visibilitychange", ask);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
forever();
