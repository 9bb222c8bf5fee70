// --- playground: a prompt's scores, its answers as they are made, and what was paged for them ---

const FILL_FRAMES = 40, STILL = matchMedia("(prefers-reduced-motion: reduce)");
let runs = []; // of the present prompt: one, or two beside each other
let stopping = null; // the AbortController of what runs
let heat = null; // the scores that are shown

const milliseconds = (value) => (value < 10 ? `${value.toFixed(1)} ms` : value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);
const cellKey = (layer, expert) => `${layer},${expert}`;
const keysOf = (pool) => new Set(pool ? pool.experts.flatMap((layer, index) => layer.map((expert) => cellKey(index, expert))) : []);

// What a person wrote into a field for a pool, as the service takes it.
function poolAsked(text) {
  const written = text.trim();
  if (written.startsWith(":")) return { name: written.slice(1) };
  if (!written) return {};
  return { pool: written.toLowerCase() === "exact" ? "full" : written };
}

async function openPlayground() {
  if (document.body.dataset.playground !== "yes") return;
  try {
    facts = await answerOf(await send("/ui/playground.json"));
  } catch (error) {
    facts = null;
    $("playground").hidden = true;
    if (error.status === 401) askForKey(error);
    else if (error.status === 403 && !mayLook) {
      askForKey(error);
      $("key-note").textContent = `${error.message}: it may neither send prompts nor see the service's state.`;
    }
    return;
  }
  $("playground").hidden = false;
  $("pool").placeholder = `${facts.default_pool}, the service's`;
  $("tokens").max = facts.max_tokens;
  const sizes = ["full", "6.25%", "12.5%", "25%", "50%", "mass:0.9", ...facts.pools.map((pool) => `:${pool.name}`)];
  $("sizes").replaceChildren(...sizes.map((size) => Object.assign(element("option"), { value: size })));
  if (!state) {
    $("model").textContent = facts.model;
    document.title = `${facts.model} · expert-pager`;
    $("status").className = "status ok";
    $("status-text").textContent = "This key may send prompts. It may not see the service's state.";
  }
  showKnownPools();
}

function showKnownPools() {
  const mine = runs.filter((run) => run.bill?.pool).map((run) => ({ ...run.bill.pool, size: `the pool of ${run.title}` }));
  const named = facts.pools.map((pool) => ({ ...pool, size: `the named pool ${pool.name}`, from: `/ui/pools/${pool.name}` }));
  const pools = [...mine.filter((pool, index) => mine.findIndex((other) => other.digest === pool.digest) === index), ...named];
  $("known-pools").hidden = !pools.length;
  $("known-pools").querySelector(".buttons").replaceChildren(
    ...pools.map((pool) => poolButton(pool.name ?? `${pool.digest.slice(0, 12)}, ${pool.size}`, pool)),
  );
}

// --- the scores ---

function showHeat() {
  if (!heat) return;
  const known = heat.scores.length > 0, routed = facts.routed_per_layer;
  $("heat").hidden = false;
  const guess = heat.expected_recall === null ? "" : `, expected to name ${percent(heat.expected_recall, 1)} of what the prefill chooses`;
  $("heat-note").textContent = known
    ? `${plural(heat.num_tokens, "token")}, by ${heat.source}${guess}${heat.codeword ? `, codeword ${heat.codeword}` : ""}`
    : "This service runs no predictor: the prefill alone scores.";
  $("heat").querySelector(".map")?.remove();
  if (!known) return;
  const map = newMap(), most = heat.scores.map((layer) => Math.max(...layer));
  $("heat").append(map);
  readCells(map, $("heat").querySelector(".readout"), () => routed, (layer, expert) => percent(heat.scores[layer][expert], 1));
  paint(map, routed, `Scores of ${plural(routed.length, "layer")}, a strip each`, (layer, expert) => [
    ["held", Math.sqrt(heat.scores[layer][expert] / (most[layer] || 1))],
  ]);
}

// --- one answer ---

class Run {
  constructor(prompt, asked, title) {
    Object.assign(this, { prompt, asked, title, tokens: [], expected: new Set(), resident: () => 0, there: new Set(), paged: new Map(), read: new Set(), bill: null, queue: [] });
    this.card = element("section", undefined, "card answer");
    const head = element("div", undefined, "head");
    head.append(element("h3", title), element("p", "", "soft"), element("p", "", "readout"));
    this.map = newMap();
    this.output = element("div", undefined, "output");
    this.output.append(element("span", prompt, "asked-for"));
    this.billLine = element("p", "", "bill");
    this.details = element("p", "", "soft");
    this.card.append(head, this.map, this.output, this.billLine, this.details);
    this.readout = head.querySelector(".readout");
    readCells(this.map, this.readout, () => facts.routed_per_layer, (layer, expert) => this.told(cellKey(layer, expert)));
  }

  told(cell) {
    if (this.paged.has(cell)) return `read from ${this.paged.get(cell) === "host" ? "host memory" : "disk"}`;
    if (this.there.has(cell)) return "there already";
    if (this.expected.has(cell)) return "expected in the pool";
    return "not in the pool";
  }

  // The expected pool, and which of it the worker holds, as far as this key may know.
  begin(scores) {
    this.expected = keysOf(scores.expected);
    this.card.querySelector(".head .soft").textContent = scores.worker ? `on ${scores.worker}` : "";
    const worker = state?.workers.find((each) => each.id === scores.worker);
    if (worker) this.resident = (layer, expert) => holds(worker, layer, expert);
    for (const cell of this.expected) {
      if (this.resident(...cell.split(",").map(Number))) this.there.add(cell);
    }
    this.draw();
  }

  draw() {
    paint(this.map, facts.routed_per_layer, `The pool of ${this.title}: ${this.there.size} experts there already, ${this.paged.size} read, ${this.expected.size} expected`, (layer, expert) => {
      const cell = cellKey(layer, expert);
      if (this.paged.has(cell)) return [[this.paged.get(cell), 1]];
      if (this.there.has(cell)) return [["held", 1]];
      if (this.expected.has(cell) && !this.bill?.pool) return [["soft", 0.5]];
      return [["held", 0.2 * this.resident(layer, expert)]];
    });
  }

  // Cells fill in the order of the reads, a few a frame: what came within milliseconds could not be seen otherwise.
  fill(pageIns) {
    for (const [layer, expert, source] of pageIns) {
      this.read.add(cellKey(layer, expert));
      this.queue.push([cellKey(layer, expert), source]);
    }
    this.drawSoon();
  }

  drawSoon() {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = null;
      const number = STILL.matches ? this.queue.length : Math.ceil(this.queue.length / FILL_FRAMES);
      for (const [cell, source] of this.queue.splice(0, number)) {
        this.there.delete(cell);
        this.paged.set(cell, source);
      }
      this.settle();
      this.draw();
      if (this.queue.length) this.drawSoon();
    });
  }

  // Once the pool is known, what was not read for it was there.
  settle() {
    if (!this.bill?.pool || this.queue.length) return;
    this.there = new Set([...keysOf(this.bill.pool)].filter((cell) => !this.paged.has(cell)));
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.ids.length) {
      this.lastMs = performance.now();
      const span = element("span", event.text);
      if (event.outside !== undefined) {
        span.style.backgroundColor = `color-mix(in srgb, var(--disk) ${Math.round(60 * event.outside ** 2)}%, transparent)`;
        span.title = `${percent(event.outside, 1)} outside of the pool`;
        span.addEventListener("click", () => (this.readout.textContent = span.title));
      }
      this.output.append(span);
      this.tokens.push({ id: event.ids.join(","), span });
    }
    if (event.page_ins) this.fill(event.page_ins);
    if (event.bill) {
      this.bill = event.bill;
      this.showBill();
      this.drawSoon();
    }
  }

  showBill() {
    const bill = this.bill, read = bytes(bill.bytes_from_disk + bill.bytes_from_host);
    const isPlain = bill.pool && !bill.experts_added && bill.exact_from === null, lookups = bill.experts_hit + bill.experts_missed;
    const number = isPlain ? bill.pool.num_experts : lookups;
    // What was read ahead of the prefill is a hit to it, and was not there when the request came.
    const there = isPlain ? [...keysOf(bill.pool)].filter((cell) => !this.read.has(cell)).length : bill.experts_hit;
    this.billLine.textContent = `${plural(number, "expert")}${isPlain ? "" : " asked for"}, ${there} there already, ${read} paged, ${milliseconds(bill.first_token_ms)} to the first token`;
    const words = [bill.mode, `${plural(bill.completion_tokens, "token")} in ${milliseconds(this.lastMs - this.askedMs)}`];
    if (bill.pool) words.push(`${percent(bill.out_of_pool_mass, 1)} outside of the pool`);
    if (bill.codeword) words.push(`codeword ${bill.codeword}`);
    if (bill.widenings) words.push(`widened ${bill.widenings} times by ${plural(bill.experts_added, "expert")}`);
    if (bill.exact_from !== null) words.push(`exact from token ${bill.exact_from + 1}`);
    if (bill.queue_ms >= 1) words.push(`${milliseconds(bill.queue_ms)} of it in line`);
    this.details.textContent = words.join(", ");
  }

  async answer(settings, signal) {
    const scores = await answerOf(await send("/ui/scores", { prompt: this.prompt, ...this.asked, ...settings.drift }, signal));
    heat ??= scores;
    showHeat();
    this.begin(scores);
    const body = { prompt: this.prompt, ...this.asked, ...settings.drift, max_tokens: settings.tokens };
    this.askedMs = performance.now();
    const response = await send("/ui/answers", body, signal);
    if (!response.ok) await answerOf(response);
    for await (const event of eventsOf(response)) this.take(event);
  }
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part.replace(/^data: /, ""));
  }
}

// --- two answers beside each other ---

// Of each of two lists, which items belong to a longest list that both have in this order.
function shared(ones, others) {
  const lengths = Array.from({ length: ones.length + 1 }, () => new Array(others.length + 1).fill(0));
  for (let i = ones.length - 1; i >= 0; i--) {
    for (let j = others.length - 1; j >= 0; j--) {
      lengths[i][j] = ones[i] === others[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const found = [new Set(), new Set()];
  for (let i = 0, j = 0; i < ones.length && j < others.length; ) {
    if (ones[i] === others[j]) {
      found[0].add(i++);
      found[1].add(j++);
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return found;
}

function markDifferences() {
  const [one, other] = runs;
  if (!one?.bill || !other?.bill) return;
  const same = shared(...runs.map((run) => run.tokens.map((token) => token.id)));
  for (const [index, run] of runs.entries()) {
    for (const [number, token] of run.tokens.entries()) token.span.classList.toggle("differs", !same[index].has(number));
  }
  const first = one.tokens.findIndex((token, index) => token.id !== other.tokens[index]?.id);
  const number = one.tokens.length - same[0].size;
  $("differences").textContent = number || other.tokens.length > same[1].size
    ? `${number} of the ${plural(one.tokens.length, "token")} of ${one.title} are not in ${other.title}; they part at token ${(first < 0 ? one.tokens.length : first) + 1}.`
    : `Both have the same ${plural(one.tokens.length, "token")}.`;
}

async function askBoth(event) {
  event.preventDefault();
  stopping?.abort();
  const mine = (stopping = new AbortController());
  const fields = [$("pool"), ...($("other").value.trim() ? [$("other")] : [])];
  const drift = $("drift").value.trim();
  const settings = { tokens: Number($("tokens").value), drift: drift ? { drift } : {} };
  heat = null;
  runs = fields.map((field) => new Run($("prompt").value, poolAsked(field.value), field.value.trim() || facts.default_pool));
  $("answers").replaceChildren(...runs.map((run) => run.card));
  $("answers-legend").hidden = false;
  $("ask-error").hidden = true;
  $("differences").textContent = "";
  $("stop").disabled = false;
  for (const run of runs) run.draw();
  try {
    for (const run of runs) await run.answer(settings, mine.signal); // one after the other: neither pays for the other
    markDifferences();
  } catch (error) {
    if (stopping !== mine) return;
    $("ask-error").hidden = false;
    $("ask-error").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    if (error.status === 401) askForKey(error);
  } finally {
    if (stopping === mine) {
      $("stop").disabled = true;
      stopping = null;
      showKnownPools();
    }
  }
}

$("ask").addEventListener("submit", askBoth);
$("stop").addEventListener("click", () => stopping?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
function redraw() {
  showHeat();
  for (const run of runs) run.draw();
}
window.addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

openPlayground();
forever();
