// Draws /status, and again as long as the page is looked at: sums of all models, details of those that are open.
"use strict";

// Without what a link may carry before the host (user:token@): fetch refuses that, and the browser sends it anyway.
const STATUS = new URL("status", location.origin + location.pathname).href;
const BUSY_MS = 1000;
const IDLE_MS = 3000;
const LATE_MS = 10000;
const SEARCH_MS = 250;
const SILENT_SECONDS = 15;
const OPEN_MODELS = 2; // where there are no more, they are open at first
const ASKED_MODELS = 8; // whose details the server gives at once
const MORE = 200;
const STATES = { initializing: "loading", incomplete: "incomplete", ready: "ready", stale: "gone" };
const asked = { search: "", replicas: 20, bars: 30 };

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
  const number = (value) => value.toLocaleString("en");
  const tiles = [["Models", number(totals.models), "", ""],
    ["Replicas", number(totals.replicas_ready), totals.replicas_ready ? "ready" : "zero", `of ${number(totals.replicas_wanted)}`],
    ["Loading", number(totals.initializing), totals.initializing ? "initializing" : "zero", totals.initializing === 1 ? "rank" : "ranks"],
    ["From peers", share(totals.bytes_from_workers, totals.bytes), totals.bytes ? "" : "zero", totals.loads_kept ? `of ${count(totals.loads_kept, "load")}` : ""],
    ["Storage spared", bytes(totals.bytes_from_workers), totals.bytes_from_workers ? "" : "zero", ""]];
  keepList(byId("tiles"), tiles, (tile) => tile[0],
    ([name]) => make("div", "", make("dt", "", name), make("dd", "", make("span", ""), make("small", ""))),
    (tile, [, value, kind, beside]) => {
      tile.className = kind;
      setText(tile.querySelector("span"), value);
      setText(tile.querySelector("small"), beside);
    });
}

function drawParts(line, parts) {
  keepList(line, parts.map((part, index) => [String(index), ...part]).filter((part) => part[1]), (part) => part[0],
    ([, , strong]) => make(strong ? "b" : "span", ""), (element, [, text]) => setText(element, text));
}

function drawDownloads(downloads) {
  byId("downloading").hidden = downloads.length === 0;
  const create = () => make("li", "", make("div", "head", make("span", "name"), make("span", "right")),
    make("div", "soft"), make("progress", ""), make("div", "line"));
  keepList(byId("downloads"), downloads, (one) => `${one.provider}/${one.model_name}/${one.revision}`, create, (card, one) => {
    const done = percent(one.bytes_done, one.bytes_total);
    setText(card.querySelector(".name"), one.model_name);
    setText(card.querySelector(".right"), one.bytes_total ? `${Math.floor(done)} %` : one.phase);
    setText(card.querySelector(".soft"), one.message);
    setBar(card.querySelector("progress"), done, `${one.model_name}: ${Math.floor(done)} % downloaded`);
    drawParts(card.querySelector(".line"), [[`${bytes(one.bytes_done)} of ${bytes(one.bytes_total)}`, false],
      [one.files_total ? `${one.files_done} of ${one.files_total} files` : "", false], [one.provider.replace("_", " "), false],
      [one.revision ? `revision ${one.revision.slice(0, 12)}` : "", false]]);
  });
}

function setBar(bar, value, label) {
  bar.max = 100;
  bar.value = value;
  bar.setAttribute("aria-label", label);
}

// Models

function drawModels(status) {
  const models = status.models || [];
  setText(byId("own-address"), `${location.hostname}:${status.server.port}`);
  byId("no-models").hidden = status.models === null || models.length > 0 || asked.search !== "";
  setText(byId("found"), asked.search ? `${count(status.models_total, "model")} found` : "");
  setMore(byId("models-more"), status.left_out.models > 0
    ? `and ${count(status.left_out.models, "more model")} with fewer workers; the search finds them` : "");
  const few = models.length <= OPEN_MODELS;
  keepList(byId("models"), models, (model) => model.model_name.toLowerCase(), createModel,
    (card, model) => updateModel(card, model, status.details[model.model_name.toLowerCase()], status, few));
}

function createModel() {
  const summary = make("summary", "", make("div", "head", make("span", "name"), make("span", "pill")),
    make("dl", "figures"), make("div", "share"), make("div", "loading"));
  const details = make("details", "", summary, make("div", "inside", make("p", "soft asking", "asking …")));
  details.addEventListener("toggle", () => { if (details.open) refresh(); });
  return make("li", "model", details);
}

function updateModel(card, model, details, status, few) {
  if (!card.dataset.seen) {
    card.dataset.seen = "yes";
    card.firstElementChild.open = few;
  }
  const { replicas, last_rollout: last, history, loading } = model;
  setText(card.querySelector(".name"), model.model_name || "a model that no record names");
  const pill = card.querySelector("summary .pill");
  pill.className = `pill ${replicas.wanted && replicas.ready === replicas.wanted ? "ready" : replicas.wanted ? "initializing" : ""}`;
  setText(pill, model.workers ? `${replicas.ready.toLocaleString("en")} of ${replicas.wanted.toLocaleString("en")} ready` : "no worker");
  const now = status.server.now_ms;
  const figures = [
    ["Time to ready", last ? duration(last.ready_seconds_p50) : "–", last ? `median, p95 ${duration(last.ready_seconds_p95)}` : "no load yet"],
    ["Last rollout", last ? count(last.replicas, "replica") : "–", last ? `in ${duration(last.ready_seconds_all)}, ${ago((now - last.at_ms) / 1000)}` : ""],
    ["From peers", share(history.bytes_from_workers, history.bytes), history.loads ? `of ${bytes(history.bytes)}, ${count(history.loads, "load")}` : ""],
    ["Storage spared", bytes(history.bytes_from_workers), history.since_ms ? `since ${ago((now - history.since_ms) / 1000)}` : ""],
  ];
  keepList(card.querySelector(".figures"), figures, (one) => one[0],
    ([name]) => make("div", "", make("dt", "", name), make("dd", ""), make("small", "")),
    (cell, [, value, beside]) => { setText(cell.children[1], value); setText(cell.children[2], beside); });
  const states = Object.keys(STATES).filter((state) => replicas[state] > 0);
  keepList(card.querySelector(".share"), states, (state) => state, (state) => make("span", state), (part, state) => {
    part.style.flexGrow = String(replicas[state]);
    part.title = `${count(replicas[state], "replica")} ${STATES[state]}`;
  });
  drawLoading(card.querySelector(".loading"), model, loading);
  if (details && card.firstElementChild.open) drawInside(card.querySelector(".inside"), model, details, status);
}

function drawLoading(box, model, loading) {
  box.hidden = !loading;
  if (!loading) return;
  if (!box.firstChild) box.append(make("progress", ""), make("div", "line"));
  const done = percent(loading.bytes_done, loading.bytes_total);
  setBar(box.firstChild, done, `${model.model_name}: ${Math.floor(done)} % loaded`);
  const silent = loading.silent_seconds > SILENT_SECONDS;
  drawParts(box.lastChild, [[`${Math.floor(done)} %`, true], [`${count(loading.loads, "rank")} loading`, false],
    [`${bytes(loading.bytes_done)} of ${bytes(loading.bytes_total)}`, false],
    [loading.bytes_per_second === null ? "" : `${bytes(loading.bytes_per_second)}/s`, true],
    [loading.eta_seconds === null ? "" : `${duration(loading.eta_seconds)} left`, false],
    [silent ? `one silent for ${duration(loading.silent_seconds)}` : "", true]]);
}

function drawInside(box, model, details, status) {
  if (box.querySelector(".asking")) {
    box.replaceChildren(
      make("ul", "sources"),
      part("timeline-part", "Last rollout", make("p", "legend", ...["wait", "transfer", "process"].map((kind) => make("span", kind, kind))),
        make("div", "chart")),
      part("rollouts-part", "Rollouts", make("ul", "rows")),
      part("feeds-part", "Who feeds whom", make("ul", "rows")),
      part("replicas-part", "Replicas", make("ul", "rows replicas")));
  }
  const left = details.left_out;
  keepList(box.querySelector(".sources"), details.sources, (one) => one.source_id,
    () => make("li", "", make("span", "id"), make("span", "tags")), updateSource);
  drawTimeline(box.querySelector(".timeline-part"), details, status.server.now_ms);
  drawRollouts(box.querySelector(".rollouts-part"), details, status.server.now_ms);
  drawFeeds(box.querySelector(".feeds-part"), details);
  const replicas = box.querySelector(".replicas-part");
  replicas.hidden = details.replicas_total === 0;
  keepList(replicas.querySelector(".replicas"), details.replicas, (one) => one.replica, createReplica, updateReplica);
  more(replicas, left.replicas, "replica", "replicas");
  setText(replicas.querySelector("h3"), `Replicas · ${details.replicas_total.toLocaleString("en")}`);
}

function part(className, title, ...children) {
  return make("section", `part ${className}`, make("h3", "", title), ...children, make("p", "soft more"));
}

// "and 180 more", with a button that asks for them.
function more(box, left, name, what) {
  const line = box.querySelector(".more");
  line.hidden = left === 0;
  if (!left) return;
  if (!line.firstChild) {
    const button = make("button", "");
    button.addEventListener("click", () => { asked[what] += MORE; refresh(); });
    line.append(make("span", ""), " ", button);
  }
  setText(line.firstChild, `and ${count(left, `more ${name}`)}`);
  setText(line.lastChild, `show ${Math.min(MORE, left)} more`);
}

function updateSource(row, one) {
  setText(row.children[0], one.source_id);
  const tags = [one.framework, one.dtype, one.quantization, one.layout && `layout ${one.layout}`,
    one.tensor_parallel_size > 1 && `TP ${one.tensor_parallel_size}`,
    one.pipeline_parallel_size > 1 && `PP ${one.pipeline_parallel_size}`,
    one.expert_parallel_size > 1 && `EP ${one.expert_parallel_size}`,
    one.revision && `revision ${one.revision.slice(0, 12)}`,
    count(one.workers_total, "worker")].filter(Boolean);
  keepList(row.children[1], tags, (tag) => tag, (tag) => make("span", "tag", tag), () => {});
}

function barOf(began, name, pod, from, parts, note, about) {
  const seconds = parts.reduce((sum, [, each]) => sum + each, 0);
  return { label: pod || short(name), about, from: (from - began) / 1000, until: (from - began) / 1000 + seconds, parts, note };
}

function drawTimeline(box, details, nowMs) {
  const loading = details.loading.map((one) => ({ ...one, began: nowMs - 1000 * one.running_seconds }));
  const [last] = details.rollouts;
  const isNew = loading.length > 0 && last && Math.min(...loading.map((one) => one.began)) > last.at_ms + 1000 * details.rollout_gap_seconds;
  const ended = isNew ? [] : details.bars;
  box.hidden = ended.length + loading.length === 0;
  if (box.hidden) return;
  setText(box.querySelector("h3"), ended.length ? "Last rollout" : "Loading now");
  const began = Math.min(...ended.map((bar) => bar.began_ms), ...loading.map((one) => one.began));
  const open = loading.map((one) => {
    const done = `${Math.floor(percent(one.bytes_done, one.bytes_total))} %`;
    const rate = one.bytes_per_second === null ? "" : `, ${bytes(one.bytes_per_second)}/s`;
    const about = `${one.pod || one.replica}: ${bytes(one.bytes_done)} of ${bytes(one.bytes_total)}${rate}, ${PATHS[one.path] || one.path}, ${count(one.ranks, "rank")}`;
    return barOf(began, one.replica, one.pod, one.began, [["transfer running", one.running_seconds]], done, about);
  });
  const bars = ended.map((bar) => {
    const told = bar.wait_seconds + bar.transfer_seconds + bar.process_seconds;
    const wait = bar.wait_seconds + Math.max(0, bar.ready_seconds - told); // ranks began at different times
    const about = `${bar.pod || bar.replica}${bar.node ? ` on ${bar.node}` : ""}: wait ${duration(wait)}, transfer ${duration(bar.transfer_seconds)}, `
      + `process ${duration(bar.process_seconds)}; ${bytes(bar.bytes)}, ${share(bar.bytes_from_workers, bar.bytes)} from peers, ${PATHS[bar.path] || bar.path}, ${count(bar.ranks, "rank")}`;
    const parts = [["wait", wait], ["transfer", bar.transfer_seconds], ["process", bar.process_seconds]];
    return barOf(began, bar.replica, bar.pod, bar.began_ms, parts, duration(bar.ready_seconds), about);
  });
  timeline(box.querySelector(".chart"), [...open, ...bars]);
  const slower = isNew ? 0 : details.left_out.bars;
  more(box, slower + details.left_out.loading, "replica", "bars");
  if (slower) setText(box.querySelector(".more span"), `the ${ended.length} slowest of ${count(details.bars_total, "replica")}`);
}

function drawRollouts(box, details, nowMs) {
  box.hidden = details.rollouts.length < 2;
  const slowest = Math.max(...details.rollouts.map((one) => one.ready_seconds_p95), 0.001);
  keepList(box.querySelector(".rows"), details.rollouts, (one) => String(one.began_ms),
    () => make("li", "run", make("span", ""), make("span", "meter", make("i", "p95"), make("i", "p50")), make("span", "number"), make("span", "soft")),
    (row, one) => {
      setText(row.children[0], ago((nowMs - one.at_ms) / 1000));
      row.children[1].firstChild.style.width = `${percent(one.ready_seconds_p95, slowest)}%`;
      row.children[1].lastChild.style.width = `${percent(one.ready_seconds_p50, slowest)}%`;
      setText(row.children[2], `${duration(one.ready_seconds_p50)} · p95 ${duration(one.ready_seconds_p95)}`);
      setText(row.children[3], `${count(one.replicas, "replica")}, all in ${duration(one.ready_seconds_all)}, ${share(one.bytes_from_workers, one.bytes)} from peers`);
    });
  const left = details.left_out.rollouts;
  setMore(box.querySelector(".more"), left ? `and ${count(left, "earlier one")}` : "");
}

function nameOf(id, pod) {
  return id === "storage" ? "storage" : id === "" ? "workers that no report names" : pod || short(id);
}

// What a tooltip says, where a name may be cut.
const wholeOf = (id, pod) => (pod ? `${pod} (${id})` : id);

function drawFeeds(box, details) {
  box.hidden = details.feeds.length === 0;
  const most = Math.max(...details.feeds.map((one) => one.bytes), 1);
  keepList(box.querySelector(".rows"), details.feeds, (one) => `from ${one.from}`, createFeed, (row, one) => {
    const [name, meter, amount] = row.querySelector("summary").children;
    setName(name, nameOf(one.from, one.pod));
    name.title = wholeOf(one.from, one.pod);
    meter.firstChild.className = one.from === "storage" ? "storage" : "p50";
    meter.firstChild.style.width = `${percent(one.bytes, most)}%`;
    drawParts(amount, [[bytes(one.bytes), true], [`to ${count(one.receivers_total, "replica")}`, false],
      [one.bytes_per_second === null ? "" : `${bytes(one.bytes_per_second)}/s now`, true]]);
    keepList(row.querySelector("ul"), one.receivers, (to) => to.replica,
      () => make("li", "", make("span", "name"), make("span", "number")), (line, to) => {
        setName(line.firstChild, `→ ${nameOf(to.replica, to.pod)}`);
        line.firstChild.title = wholeOf(to.replica, to.pod);
        setText(line.lastChild, `${bytes(to.bytes)} · ${bytes(to.bytes_per_second)}/s${to.running ? " now" : ""}`);
      });
    setMore(row.querySelector(".more"), one.receivers_left_out ? `and ${count(one.receivers_left_out, "more replica")} with less` : "");
  });
  const left = details.left_out.givers;
  setMore(box.lastElementChild, left ? `and ${count(left, "more giver")} with less` : "");
}

function createFeed() {
  return make("li", "", make("details", "", make("summary", "feed", make("span", "name"), make("span", "meter", make("i", "")), make("span", "line")),
    make("ul", "receivers"), make("p", "soft more")));
}

// Replicas and their ranks

function createReplica() {
  const details = make("details", "", make("summary", "replica", make("span", "pill"), make("span", "name"), make("span", "soft node"),
    make("span", "number ranks"), make("span", "soft wide"), make("span", "soft number")), make("div", "scroll"));
  details.addEventListener("toggle", () => { if (details.open) refresh(); });
  return make("li", "", details);
}

function updateReplica(row, one) {
  const [state, name, node, ranks, accelerator, heard] = row.querySelector("summary").children;
  state.className = `pill ${one.state}`;
  setText(state, STATES[one.state] || one.state);
  setName(name, one.pod || short(one.replica));
  name.title = wholeOf(one.replica, one.pod);
  setText(node, one.node);
  setText(ranks, one.ready === one.ranks_total || one.state === "stale" ? count(one.ranks_total, "rank") : `${one.ready} of ${count(one.ranks_total, "rank")}`);
  setText(accelerator, one.source_load ? `${one.accelerator}, ${count(one.source_load, "reader")}` : one.accelerator);
  setText(heard, ago(one.silent_seconds));
  if (!one.ranks || !row.firstElementChild.open) return;
  const box = row.querySelector(".scroll");
  if (!box.firstChild) {
    const names = ["Rank", "Worker", "State", "Endpoint", "Weights", "Readers", "Last heard"];
    box.append(make("table", "", make("thead", "", make("tr", "", ...names.map((text, index) => make("th", ["", "", "", "wide", "wide", "wide number", "number"][index], text)))), make("tbody", "")));
  }
  keepList(box.querySelector("tbody"), one.ranks, (rank) => `${rank.source_id}/${rank.worker_id}/${rank.worker_rank}`, createRank, updateRank);
}

function createRank() {
  return make("tr", "", make("td", ""), make("td", "id"), make("td", "tight", make("span", "pill")), make("td", "wide id"), make("td", "wide"),
    make("td", "wide number"), make("td", "number"));
}

function updateRank(row, one) {
  const [rank, name, state, endpoint, weights, load, heard] = row.children;
  setText(rank, String(one.worker_rank));
  setText(name, short(one.worker_id));
  const from = one.received_from.length ? ` from ${one.received_from.map(short).join(", ")}` : "";
  name.title = `${one.worker_id}, weights ${one.digest_origin.replace("_", " ")}${from}`;
  state.firstChild.className = `pill ${one.state}`;
  setText(state.firstChild, STATES[one.state] || one.state);
  setText(endpoint, one.endpoint);
  setText(weights, `${one.digest_origin.replace("_", " ")}${one.received_from.length ? ` from ${count(one.received_from.length, "worker")}` : ""}`);
  weights.title = one.received_from.join(", ");
  setText(load, one.source_load === null ? "" : one.source_load.toFixed(0));
  setText(heard, ago(one.silent_seconds));
}

// What goes wrong, and the cache

const lineOf = () => make("li", "", make("span", "tag"), make("span", "text"), make("span", "soft"));
const times = (one, nowMs) => `${one.count > 1 ? `${one.count} times, ` : ""}${ago((nowMs - one.at_ms) / 1000)}`;
const SIDES = { offer: "not offered", receive: "not taken" };

function setTag(tag, text, code) {
  if (tag.dataset.text === text + code) return;
  tag.dataset.text = text + code;
  tag.replaceChildren(code ? codeLink(code, text) : text);
}

function drawRefusals(status) {
  const { refusals, not_shared: notShared } = status;
  byId("refused").hidden = refusals.length === 0;
  byId("not-shared").hidden = notShared.length === 0;
  setText(byId("not-shared"), `Within the last hour no worker got weights of ${notShared.join(", ")} from another.`);
  keepList(byId("refusals"), refusals, (one) => `${one.source_id}/${one.side}/${one.reason}`, lineOf, (row, one) => {
    setTag(row.children[0], one.reason.replaceAll("_", " "), one.code);
    setLinked(row.children[1], `${one.model_name}, ${SIDES[one.side] || one.side}: ${one.text}`);
    row.children[1].title = `${one.source_id}, worker ${one.worker_id}`;
    setText(row.children[2], times(one, status.server.now_ms));
  });
  const left = status.left_out.refusals;
  setMore(byId("refusals-more"), left ? `and ${count(left, "more reason")}; mx sources has them all` : "");
}

function drawDoubts(doubts, nowMs) {
  byId("doubted").hidden = doubts.length === 0;
  keepList(byId("doubts"), doubts, (one) => `${one.at_ms}/${one.worker_id}/${one.kind}`, lineOf, (row, one) => {
    setTag(row.children[0], one.kind.replaceAll("_", " "), one.code);
    setLinked(row.children[1], `rank ${one.worker_rank}, told by ${short(one.worker_id)}${one.holders.length ? ` of ${one.holders.map(short).join(", ")}` : ""}: ${one.text}`);
    row.children[1].title = `${one.source_id}: ${one.holders.join(", ")}`;
    setText(row.children[2], ago((nowMs - one.at_ms) / 1000));
  });
}

function drawErrors(errors, nowMs) {
  byId("problems").hidden = errors.length === 0;
  keepList(byId("errors"), errors.map((error, index) => ({ ...error, key: `${errors.length - index}/${error.kind}/${error.text}` })),
    (error) => error.key, lineOf, (row, error) => {
      setText(row.children[0], error.kind);
      setLinked(row.children[1], error.text);
      setText(row.children[2], times(error, nowMs));
    });
}

function drawCache(cache, nowMs) {
  byId("cache").hidden = !cache;
  if (!cache) return;
  drawParts(byId("cache-line"), [[bytes(cache.used_bytes), true], [cache.limit_bytes ? `of ${bytes(cache.limit_bytes)}` : "no limit", false],
    [`${bytes(cache.free_bytes)} free on the disk`, false], [count(cache.models, "model"), false]]);
  byId("cache-used").hidden = !cache.limit_bytes;
  setBar(byId("cache-used"), percent(cache.used_bytes, cache.limit_bytes), "used of the cache's limit");
  keepList(byId("cached"), cache.cached, (one) => `${one.provider}/${one.model_name}/${one.revision}`,
    () => make("li", "", make("span", "name"), make("span", "id soft"), make("span", "tag"), make("span", "number"), make("span", "soft number")),
    (row, one) => {
      setText(row.children[0], one.model_name);
      setText(row.children[1], one.revision.slice(0, 12));
      setText(row.children[2], one.pinned ? "pinned" : "");
      row.children[2].hidden = !one.pinned;
      setText(row.children[3], bytes(one.bytes));
      setText(row.children[4], one.used_ms ? `used ${ago(Math.max(0, nowMs - one.used_ms) / 1000)}` : "");
    });
  const left = cache.models - cache.cached.length;
  setMore(byId("cached-more"), left > 0 ? `and ${count(left, "more model")}, used longer ago; mx models list has them` : "");
}

// Asking

function drawAll(status) {
  document.body.classList.remove("lost");
  const now = status.server.now_ms;
  drawHeader(status);
  drawTiles(status.totals);
  drawModels(status);
  drawRefusals(status);
  drawDoubts(status.doubts, now);
  drawDownloads(status.downloads);
  drawCache(status.cache, now);
  drawErrors(status.errors, now);
  setText(byId("updated"), `updated ${new Date().toLocaleTimeString([], { hour12: false })}`);
}

function drawLost(reason) {
  document.body.classList.add("lost");
  const state = byId("state");
  state.className = "pill bad";
  setText(state, "no answer");
  showAlarm(`The server does not answer (${reason}). What is below is old; trying again.`);
}

// Details of the models that are open alone, and ranks of the replicas that are: of all they would be megabytes a second.
let turn = 0;

function question() {
  const open = Array.from(byId("models").children).filter((card) => card.firstElementChild.open);
  turn = open.length > ASKED_MODELS ? (turn + ASKED_MODELS) % open.length : 0;
  const shown = [...open.slice(turn), ...open.slice(0, turn)].slice(0, ASKED_MODELS);
  const ranks = shown.flatMap((card) => Array.from(card.querySelectorAll(".replicas details[open]"), (one) => one.parentElement.dataset.key));
  return `${STATUS}?${new URLSearchParams([["loads", 0], ["replicas", asked.replicas], ["bars", asked.bars],
    ...(asked.search ? [["search", asked.search]] : []), ...shown.map((card) => ["model", card.dataset.key]),
    ...ranks.slice(0, 100).map((name) => ["ranks", name])])}`;
}

let timer = 0;
let asking = false;
let again = false;

async function refresh() {
  again = asking;
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  let pause = IDLE_MS;
  try {
    const answer = await fetch(question(), { cache: "no-store", signal: AbortSignal.timeout(LATE_MS) });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    const status = await answer.json();
    drawAll(status);
    if (status.totals.loads_running || status.downloads.length || status.totals.initializing) pause = BUSY_MS;
  } catch (error) {
    drawLost(error.name === "TimeoutError" ? "timed out" : error.message);
  } finally {
    asking = false;
    if (again) setTimeout(refresh, 0);
    else if (!document.hidden) timer = setTimeout(refresh, pause);
  }
}

let typing = 0;
byId("search").addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => { asked.search = event.target.value.trim(); refresh(); }, SEARCH_MS);
});
window.addEventListener("resize", () => { clearTimeout(typing); typing = setTimeout(refresh, SEARCH_MS); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
