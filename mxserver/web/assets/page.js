// Draws /status, and again as long as the page is looked at. All text of workers goes in as text, never as markup.
"use strict";

// Without what a link may carry before the host (user:token@): fetch refuses that, and the browser sends it anyway.
const STATUS = new URL("status", location.origin + location.pathname).href;
const BUSY_MS = 1000;
const IDLE_MS = 3000;
const LATE_MS = 10000;
const SILENT_SECONDS = 15;
const OPEN_WORKERS = 8;
const OPEN_FLEETS = 20; // more are closed at first
const ASKED_FLEETS = 100; // of those that are open
const ASKED_WORKERS = 50;
const PATHS = {
  peer_same_host: "same host", peer_tcp: "peer, TCP", peer_rdma: "peer, RDMA", storage: "storage",
  object_store: "object store", server: "server", unknown: "unknown",
};
const STATES = { ready: "ready", initializing: "loading", stale: "stale" };

const byId = (id) => document.getElementById(id);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// One child of `parent` for each item, in their order; a child stays the same element as long as its key is there, so
// that what is open, selected or scrolled stays so.
function keepList(parent, items, keyOf, create, update) {
  const old = new Map(Array.from(parent.children, (child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = old.get(key);
    old.delete(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
    update(child, item);
  }
  for (const child of old.values()) child.remove();
}

function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${unit === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

const ago = (seconds) => (seconds < 2 ? "now" : seconds < 10 ? `${Math.floor(seconds)} s ago` : `${duration(seconds)} ago`);
// Our workers are called by 32 hexadecimal digits, of which the first tell them apart; the whole is in the tooltip.
const short = (id) => (/^[0-9a-f]{32}$/.test(id) ? id.slice(0, 12) : id);
const worker = (id, rank) => `${short(id)} · rank ${rank}`;
const percent = (part, whole) => (whole > 0 ? Math.min(100, (100 * part) / whole) : 0);

function drawHeader(status) {
  const { server } = status;
  const state = byId("state");
  state.className = server.ready ? "pill ready" : "pill bad";
  setText(state, server.ready ? "ready" : "not ready");
  const facts = [server.version && `version ${server.version}`, server.store && `store ${server.store}`,
    server.uptime_seconds < 10 ? "just started" : `up ${duration(server.uptime_seconds)}`];
  setText(byId("facts"), facts.filter(Boolean).join(" · "));
  showAlarm(server.ready ? "" : `Not ready: ${server.reason}`);
}

function showAlarm(text) {
  const alarm = byId("alarm");
  alarm.hidden = !text;
  setText(alarm, text);
}

function drawTiles(totals) {
  const tiles = [["Models", totals.models, ""], ["Ready", totals.ready, "ready"],
    ["Loading", totals.initializing, "initializing"], ["Stale", totals.stale, "stale"],
    ["Transfers", totals.loads_running, ""]];
  keepList(byId("tiles"), tiles, (tile) => tile[0], ([name]) => make("div", "", make("dt", "", name), make("dd", "")),
    (tile, [, count, state]) => {
      tile.className = `${state}${count ? "" : " zero"}`;
      setText(tile.lastElementChild, count.toLocaleString("en"));
    });
}

function makeProgressCard() {
  const card = make("li", "", make("div", "head", make("span", "name"), make("span", "right")),
    make("div", "soft"), make("progress", ""), make("div", "line"));
  card.querySelector("progress").max = 100;
  return card;
}

function drawDownloads(downloads) {
  byId("downloading").hidden = downloads.length === 0;
  keepList(byId("downloads"), downloads, (one) => `${one.provider}/${one.model_name}/${one.revision}`, makeProgressCard, (card, one) => {
    const share = percent(one.bytes_done, one.bytes_total);
    setText(card.querySelector(".name"), one.model_name);
    setText(card.querySelector(".right"), one.bytes_total ? `${Math.floor(share)} %` : one.phase);
    setText(card.querySelector(".soft"), one.message);
    card.querySelector("progress").value = share;
    card.querySelector("progress").setAttribute("aria-label", `${one.model_name}: ${Math.floor(share)} % downloaded`);
    drawParts(card.querySelector(".line"), [[`${bytes(one.bytes_done)} of ${bytes(one.bytes_total)}`, false],
      [one.files_total ? `${one.files_done} of ${one.files_total} files` : "", false], [one.provider.replace("_", " "), false],
      [one.revision ? `revision ${one.revision.slice(0, 12)}` : "", false]]);
  });
}

function drawLoads(loads) {
  byId("loading").hidden = loads.length === 0;
  keepList(byId("loads"), loads, (load) => `${load.source_id}/${load.worker_id}/${load.worker_rank}`, makeProgressCard, (card, load) => {
    const share = percent(load.bytes_done, load.bytes_total);
    const silent = load.silent_seconds > SILENT_SECONDS;
    card.className = silent ? "silent" : "";
    setText(card.querySelector(".name"), load.model_name || load.source_id);
    setText(card.querySelector(".right"), `${Math.floor(share)} %`);
    setText(card.querySelector(".soft"), worker(load.worker_id, load.worker_rank));
    card.querySelector(".soft").title = load.worker_id;
    const bar = card.querySelector("progress");
    bar.value = share;
    bar.setAttribute("aria-label", `${load.worker_id}: ${Math.floor(share)} % loaded`);
    const from = load.from_worker_id
      ? `from ${short(load.from_worker_id)}${load.holders > 1 ? ` and ${load.holders - 1} more` : ""}` : "";
    const rate = silent ? `silent for ${duration(load.silent_seconds)}`
      : load.bytes_per_second === null ? "" : `${bytes(load.bytes_per_second)}/s`;
    const left = silent || load.eta_seconds === null ? "" : `${duration(load.eta_seconds)} left`;
    drawParts(card.querySelector(".line"), [
      [`${bytes(load.bytes_done)} of ${bytes(load.bytes_total)}`, false], [rate, true], [left, true],
      [PATHS[load.path] || load.path, false], [from, false]]);
  });
}

function drawParts(line, parts) {
  keepList(line, parts.map((part, index) => [String(index), ...part]).filter((part) => part[1]), (part) => part[0],
    ([, , strong]) => make(strong ? "b" : "span", ""), (element, [, text]) => setText(element, text));
}

function drawFleets(fleets, port) {
  setText(byId("own-address"), `${location.hostname}:${port}`);
  byId("no-fleets").hidden = fleets === null || fleets.length > 0;
  const few = fleets !== null && fleets.length <= OPEN_FLEETS;
  keepList(byId("fleets"), fleets || [], (fleet) => fleet.source_id, createFleet,
    (card, fleet) => updateFleet(card, fleet, few));
}

function createFleet() {
  const head = make("tr", "", ...["Worker", "State", "Accelerator", "Endpoint", "Load", "Last heard"].map((name) => {
    const cell = make("th", { Accelerator: "wide", Endpoint: "wide", Load: "wide number", "Last heard": "number" }[name] || "");
    cell.textContent = name;
    return cell;
  }));
  const table = make("table", "", make("thead", "", head), make("tbody", ""));
  const details = make("details", "", make("summary", ""), make("div", "scroll", table), make("p", "soft more"));
  details.addEventListener("toggle", () => { if (details.open) refresh(); });
  return make("li", "",
    make("div", "head", make("span", "name"), make("span", "id soft right")), make("div", "tags"), make("div", "share"),
    details);
}

function updateFleet(card, fleet, few) {
  if (!card.dataset.seen) {
    card.dataset.seen = "yes";
    card.querySelector("details").open = few && fleet.workers_total <= OPEN_WORKERS;
  }
  setText(card.querySelector(".name"), fleet.model_name);
  setText(card.querySelector(".id"), fleet.source_id);
  const tags = [fleet.framework, fleet.dtype, fleet.quantization, fleet.layout && `layout ${fleet.layout}`,
    fleet.tensor_parallel_size > 1 && `TP ${fleet.tensor_parallel_size}`,
    fleet.pipeline_parallel_size > 1 && `PP ${fleet.pipeline_parallel_size}`,
    fleet.expert_parallel_size > 1 && `EP ${fleet.expert_parallel_size}`,
    fleet.revision && `revision ${fleet.revision.slice(0, 12)}`].filter(Boolean);
  keepList(card.querySelector(".tags"), tags, (tag) => tag, (tag) => make("span", "tag", tag), () => {});
  const states = Object.keys(STATES).filter((state) => fleet[state] > 0);
  keepList(card.querySelector(".share"), states, (state) => state, (state) => make("span", state), (part, state) => {
    part.style.flexGrow = String(fleet[state]);
    part.title = `${fleet[state]} ${STATES[state]}`;
  });
  drawParts(card.querySelector("summary"), states.map((state) => [`${fleet[state]} ${STATES[state]}  `, state === "ready"]));
  keepList(card.querySelector("tbody"), fleet.workers, (one) => `${one.worker_id}/${one.worker_rank}`, createWorker, updateWorker);
  const hidden = fleet.workers_total - fleet.workers.length;
  setText(card.querySelector(".more"), hidden > 0 ? `and ${hidden.toLocaleString("en")} more; /status?workers=10000 has them` : "");
}

function createWorker() {
  return make("tr", "", make("td", ""), make("td", "tight", make("span", "pill")), make("td", "wide"),
    make("td", "wide id"), make("td", "wide number"), make("td", "number"));
}

function updateWorker(row, one) {
  const [name, state, accelerator, endpoint, load, heard] = row.children;
  setText(name, worker(one.worker_id, one.worker_rank));
  const from = one.received_from.length ? ` from ${one.received_from.map(short).join(", ")}` : "";
  name.title = `${one.worker_id}, weights ${one.digest_origin.replace("_", " ")}${from}`;
  state.firstChild.className = `pill ${one.state}`;
  setText(state.firstChild, STATES[one.state] || one.state);
  setText(accelerator, one.accelerator);
  setText(endpoint, one.endpoint);
  setText(load, one.source_load === null ? "" : one.source_load.toFixed(2));
  setText(heard, ago(one.silent_seconds));
}

function drawFinished(loads, nowMs) {
  byId("finished").hidden = loads.length === 0;
  keepList(byId("finished-rows"), loads, (load) => `${load.at_ms}/${load.source_id}/${load.worker_id}/${load.worker_rank}`,
    () => make("tr", "", make("td", "tight"), make("td", "model"), make("td", "wide"), make("td", "tight"), make("td", "wide"),
      make("td", "number wide"), make("td", "number wide"), make("td", "number")),
    (row, load) => {
      const rate = load.seconds > 0 ? `${bytes(load.bytes / load.seconds)}/s` : "";
      const texts = [ago((nowMs - load.at_ms) / 1000), load.model_name, worker(load.worker_id, load.worker_rank),
        PATHS[load.path] || load.path, short(load.from_worker_id) || "–", bytes(load.bytes), duration(load.seconds), rate];
      texts.forEach((text, index) => setText(row.children[index], text));
    });
}

function drawErrors(errors, nowMs) {
  byId("problems").hidden = errors.length === 0;
  keepList(byId("errors"), errors.map((error, index) => ({ ...error, key: `${errors.length - index}/${error.kind}/${error.text}` })),
    (error) => error.key,
    () => make("li", "", make("span", "tag"), make("span", "text"), make("span", "soft")),
    (row, error) => {
      setText(row.children[0], error.kind);
      setText(row.children[1], error.text);
      setText(row.children[2], `${error.count > 1 ? `${error.count} times, ` : ""}${ago((nowMs - error.at_ms) / 1000)}`);
    });
}

const SIDES = { offer: "not offered", receive: "not taken" };

function drawRefusals(refusals, notShared, nowMs) {
  byId("refused").hidden = refusals.length === 0;
  byId("not-shared").hidden = notShared.length === 0;
  setText(byId("not-shared"), `Within the last hour no worker got weights of ${notShared.join(", ")} from another.`);
  keepList(byId("refusals"), refusals, (one) => `${one.source_id}/${one.side}/${one.reason}`,
    () => make("li", "", make("span", "tag"), make("span", "text"), make("span", "soft")),
    (row, one) => {
      setText(row.children[0], one.reason.replaceAll("_", " "));
      setText(row.children[1], `${one.model_name}, ${SIDES[one.side] || one.side}: ${one.text}`);
      row.children[1].title = `${one.source_id}, worker ${one.worker_id}`;
      setText(row.children[2], `${one.count > 1 ? `${one.count} times, ` : ""}${ago((nowMs - one.at_ms) / 1000)}`);
    });
}

function draw(status) {
  document.body.classList.remove("lost");
  drawHeader(status);
  drawTiles(status.totals);
  drawLoads(status.loads);
  drawDownloads(status.downloads);
  drawFleets(status.fleets, status.server.port);
  drawFinished(status.finished_loads, status.server.now_ms);
  drawRefusals(status.refusals, status.not_shared, status.server.now_ms);
  drawErrors(status.errors, status.server.now_ms);
  setText(byId("updated"), `updated ${new Date().toLocaleTimeString([], { hour12: false })}`);
}

function drawLost(reason) {
  document.body.classList.add("lost");
  const state = byId("state");
  state.className = "pill bad";
  setText(state, "no answer");
  showAlarm(`The server does not answer (${reason}). What is below is old; trying again.`);
}

// Workers of the fleets that are open alone: of a thousand fleets they would be megabytes each second.
function question() {
  const open = Array.from(byId("fleets").children).filter((card) => card.querySelector("details").open);
  const of = open.slice(0, ASKED_FLEETS).map((card) => ["of", card.dataset.key]);
  return `${STATUS}?${new URLSearchParams([["workers", ASKED_WORKERS], ...(of.length ? of : [["of", ""]])])}`;
}

let timer = 0;
let asking = false;

async function refresh() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  let pause = IDLE_MS;
  try {
    const answer = await fetch(question(), { cache: "no-store", signal: AbortSignal.timeout(LATE_MS) });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    const status = await answer.json();
    draw(status);
    if (status.loads.length || status.downloads.length || status.totals.initializing) pause = BUSY_MS;
  } catch (error) {
    drawLost(error.name === "TimeoutError" ? "timed out" : error.message);
  } finally {
    asking = false;
    if (!document.hidden) timer = setTimeout(refresh, pause);
  }
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
