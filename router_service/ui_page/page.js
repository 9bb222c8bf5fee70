"use strict";
// Everything from the router is put into the document as text.
const EVERY_MS = 2000, WINDOW_S = 300, ROW_PX = 11;
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let state = null, receivedMs = 0;
let key = ""; // in this page's memory and nowhere else
let mayLook = true; // what the key allows

const percent = (part, whole) => (whole ? `${Math.round((1000 * part) / whole) / 10} %` : "–");
const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
const sum = (values) => values.reduce((total, value) => total + value, 0);

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

const duration = (seconds) => (seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`);

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
  const { median, p95 } = state.first_token_s;
  $("tokens-per-s").textContent = `${(total("tokens") / seconds).toFixed(1)}/s`;
  $("first-token").textContent = median === null ? "–" : `${duration(median)}, ${duration(p95)}`;
  $("errors").textContent = `${total("errors")} of ${total("answers") + total("errors")}`;
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

function showSent() {
  const rate = (sample) => sample.tokens / (sample.seconds || 1);
  const most = Math.max(1, ...state.samples.map(rate));
  const bars = spans().flatMap(([start, end, sample]) => {
    const height = (79 * rate(sample)) / most, width = Math.max(0, end - start - 0.4);
    const bar = drawing("rect", { class: "host", x: start, y: 80 - height, width, height });
    return sample.errors ? [bar, drawing("rect", { class: "failed", x: start, y: 72, width, height: 8 })] : [bar];
  });
  $("sent").querySelector(".top").textContent = most > 1 ? `${Math.round(most)}/s` : "";
  chart("sent", `Tokens sent: ${$("tokens-per-s").textContent}, answers that failed: ${$("errors").textContent}`, bars);
}

function showWaits() {
  const most = Math.max(0.001, ...state.samples.map((sample) => sample.first_token_s || 0));
  const lines = spans().filter(([, , sample]) => sample.first_token_s !== null).map(([start, end, sample]) =>
    drawing("path", { class: "rate", d: `M${start} ${79 - (78 * sample.first_token_s) / most}H${end}` }));
  $("waits").querySelector(".top").textContent = lines.length ? duration(most) : "";
  chart("waits", `Time to the first token, median and 95 %: ${$("first-token").textContent}`, lines);
}

const READOUTS = {
  hits: (sample) => percent(sample.experts_hit, sample.experts_hit + sample.experts_missed),
  bandwidth: (sample) =>
    `${bytes(sample.bytes_from_disk / (sample.seconds || 1))}/s disk, ${bytes(sample.bytes_from_host / (sample.seconds || 1))}/s host`,
  sent: (sample) => `${(sample.tokens / (sample.seconds || 1)).toFixed(1)}/s, ${sample.answers} answered, ${sample.errors} failed`,
  waits: (sample) => (sample.first_token_s === null ? "–" : duration(sample.first_token_s)),
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

// --- maps: layers by experts ---

function newMap() {
  const map = element("div", undefined, "map"), canvas = element("canvas");
  canvas.setAttribute("role", "img");
  map.append(element("div", undefined, "layers"), canvas, element("p", undefined, "axis"));
  return map;
}

// The canvas's cells get the colours of `of(layer, expert)`, each with how much of it, one over the other.
function paint(map, routed, label, of) {
  map.querySelector(".layers").replaceChildren(element("span", "0"), element("span", String(routed.length - 1)));
  map.querySelector(".axis").replaceChildren(element("span", "expert 0"), element("span", String(Math.max(...routed) - 1)));
  const canvas = map.querySelector("canvas"), columns = Math.max(1, ...routed), colours = getComputedStyle(document.documentElement);
  canvas.setAttribute("aria-label", label);
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
      for (const [colour, share] of [["absent", 1], ...of(layer, expert)]) {
        pen.globalAlpha = share;
        pen.fillStyle = colours.getPropertyValue(`--${colour}`);
        pen.fillRect(...box);
      }
    }
  }
}

function cellAt(canvas, routed, event) {
  const box = canvas.getBoundingClientRect();
  const layer = Math.floor((routed.length * (event.clientY - box.top)) / box.height);
  const expert = Math.floor((Math.max(...routed) * (event.clientX - box.left)) / box.width);
  return expert >= 0 && expert < routed[layer] ? [layer, expert] : null;
}

// `tell(layer, expert)` is what the readout says of the cell under the pointer.
function readCells(map, readout, routedNow, tell) {
  const canvas = map.querySelector("canvas");
  canvas.addEventListener("pointermove", (event) => {
    const cell = cellAt(canvas, routedNow(), event);
    readout.textContent = cell ? `layer ${cell[0]}, expert ${cell[1]}: ${tell(...cell)}` : "";
  });
  canvas.addEventListener("pointerleave", () => (readout.textContent = ""));
}

// --- residency ---

const holds = (worker, layer, expert) => (parseInt(worker.resident[layer].substr(2 * (expert >> 3), 2), 16) >> (expert & 7)) & 1;
const held = (worker) => sum(state.model.routed_per_layer.map((routed, layer) => sum(Array.from({ length: routed }, (_, expert) => holds(worker, layer, expert)))));

function mapOf(key) {
  const found = [...$("maps").children].find((card) => card.dataset.key === key);
  if (found) return found;
  const card = element("section", undefined, "card"), head = element("div", undefined, "head"), map = newMap();
  card.dataset.key = key;
  head.append(element("h3"), element("p", "", "soft"), element("p", "", "readout"));
  card.append(head, map);
  readCells(map, card.querySelector(".readout"), () => state.model.routed_per_layer, (layer, expert) => {
    const workers = state.workers.filter((worker) => !key || worker.id === key);
    const count = sum(workers.map((worker) => holds(worker, layer, expert)));
    return key ? (count ? "in a slot" : "not in a slot") : `on ${plural(count, "worker")}`;
  });
  return card;
}

function showMap(card, title, note, workers) {
  const routed = state.model.routed_per_layer, number = sum(workers.map(held));
  card.querySelector("h3").textContent = title;
  card.querySelector(".soft").textContent = note;
  const label = `${title}: ${plural(number, "expert")} in device slots, ${plural(routed.length, "layer")} by experts`;
  const share = (layer, expert) => sum(workers.map((worker) => holds(worker, layer, expert))) / workers.length;
  paint(card.querySelector(".map"), routed, label, (layer, expert) => [["held", share(layer, expert)]]);
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
      const isPool = label === "Pool" && pool.digest, cell = element("td", isPool ? "" : String(text), isPool ? "digest" : "");
      if (isPool) cell.append(poolButton(text, { digest: pool.digest, size: pool.size, from: `/ui/pool.json?digest=${pool.digest}` }));
      cell.dataset.label = label;
      return cell;
    }));
    return row;
  });
  const focused = document.activeElement?.closest("#pools") ? document.activeElement.dataset.digest : undefined;
  $("pools").tBodies[0].replaceChildren(...rows);
  if (focused) $("pools").querySelector(`button[data-digest="${focused}"]`)?.focus();
  $("pools").hidden = !rows.length;
  $("no-pools").hidden = rows.length > 0;
  $("pools-left-out").hidden = !state.pools_left_out;
  $("pools-left-out").textContent = `${plural(state.pools_left_out, "more pool")} not shown.`;
}

// --- pools that are looked at: the experts of one, and what two share ---

let looked = []; // at most two, the latest last

function poolButton(text, pool) {
  const button = element("button", text);
  button.type = "button";
  button.dataset.digest = pool.digest;
  button.setAttribute("aria-pressed", String(looked.some((each) => each.digest === pool.digest)));
  button.addEventListener("click", () => look(pool));
  return button;
}

async function look(pool) {
  const others = looked.filter((each) => each.digest !== pool.digest);
  if (others.length === looked.length) {
    try {
      const experts = pool.experts ?? (await answerOf(await send(pool.from))).experts;
      looked = [...others.slice(-1), { ...pool, experts }];
    } catch (error) {
      $("cells-title").textContent = error.message;
      $("cells").hidden = false;
      return;
    }
  } else {
    looked = others;
  }
  showCells();
  if (looked.length) $("cells").scrollIntoView({ block: "nearest" });
}

const nameOf = (pool) => pool.name ?? pool.digest.slice(0, 12);
const modelNow = () => state?.model ?? facts;

function showCells() {
  for (const button of document.querySelectorAll("button[data-digest]")) {
    button.setAttribute("aria-pressed", String(looked.some((pool) => pool.digest === button.dataset.digest)));
  }
  $("cells").hidden = !looked.length;
  if (!looked.length) return;
  const [first, second] = looked, routed = modelNow().routed_per_layer;
  const sets = looked.map((pool) => pool.experts.map((layer) => new Set(layer)));
  const size = (pool) => sum(pool.experts.map((layer) => layer.length));
  const shared = second ? sum(first.experts.map((layer, index) => layer.filter((expert) => sets[1][index].has(expert)).length)) : 0;
  const note = second
    ? `${shared} experts in both: ${percent(shared, size(first))} of the ${size(first)} of ${nameOf(first)}, ${percent(shared, size(second))} of the ${size(second)} of ${nameOf(second)}`
    : `${plural(size(first), "expert")}, ${first.size ?? ""}`;
  $("cells-title").textContent = looked.map(nameOf).join(" and ");
  $("cells-note").textContent = note;
  $("cells-legend").hidden = !second;
  for (const [index, pool] of looked.entries()) $("cells-legend").children[index].textContent = `${nameOf(pool)} alone`;
  const map = $("cells").querySelector(".map") ?? $("cells").insertBefore(newMap(), $("cells-legend"));
  paint(map, routed, `${$("cells-title").textContent}: ${note}`, (layer, expert) => {
    const [one, other] = sets.map((pool) => pool[layer].has(expert));
    return one && other ? [["both", 1]] : one ? [["held", 1]] : other ? [["disk", 1]] : [];
  });
  const latest = looked.at(-1), model = modelNow().name;
  const experts = latest.name ? `--pool ${latest.name} --server HOST:PORT` : `--experts-file ${latest.digest}.json`;
  $("slice-line").textContent = `expert-pager slice ${model} OUT ${experts}`;
}

$("cells-close").addEventListener("click", () => {
  looked = [];
  showCells();
});
$("save").addEventListener("click", () => {
  const latest = looked.at(-1), link = element("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(latest.experts)], { type: "application/json" }));
  link.download = `${latest.digest}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// --- asking ---

let facts = null; // of the playground, where there is one

function send(path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body === undefined) return fetch(path, { cache: "no-store", headers });
  const json = { ...headers, "content-type": "application/json" };
  return fetch(path, { method: "POST", cache: "no-store", headers: json, body: JSON.stringify(body), signal });
}

// The JSON of an answer; throws what a refusal says.
async function answerOf(response) {
  if (response.ok) return response.json();
  const text = await response.text();
  let message = text.trim().slice(0, 300);
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // not in JSON: the text itself is the message
  }
  const error = new Error(message || response.statusText);
  error.status = response.status;
  throw error;
}

function show() {
  if (state) {
    $("main").hidden = false;
    showFigures();
    showHits();
    showBandwidth();
    showSent();
    showWaits();
    showMaps();
    showPools();
    document.body.dataset.shown = state.now_unix_s;
  }
  if (looked.length) showCells();
}

function askForKey(error) {
  $("key-form").hidden = false;
  $("key-note").textContent = key ? error.message : "This service asks for a key. It is kept in this page's memory alone.";
  $("status").className = "status";
  $("status-text").textContent = "Enter a key to see this service.";
}

async function ask() {
  if (document.visibilityState === "hidden" || !mayLook) return;
  try {
    state = await answerOf(await send("/ui/state.json"));
    receivedMs = performance.now();
    show();
  } catch (error) {
    if (error.status === 401 || error.status === 403) {
      mayLook = false;
      state = null;
      $("main").hidden = true;
      if (error.status === 401) askForKey(error);
      return;
    }
    const ago = state ? `for ${Math.round((performance.now() - receivedMs) / 1000)} s` : "yet";
    $("status").className = "status bad";
    $("status-text").textContent = `The router has not answered ${ago}; what is shown is old.`;
  }
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  $("key-form").hidden = true;
  mayLook = true;
  await ask();
  await openPlayground();
});

async function forever() {
  for (;;) {
    await ask();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

window.addEventListener("resize", show);
document.addEventListener("visibilitychange", ask);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
