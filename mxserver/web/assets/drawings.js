// What page.js draws with: elements, texts of figures, the timeline as SVG. All text goes in as text, never as markup.
"use strict";

const PATHS = {
  peer_same_host: "same host", peer_tcp: "peer, TCP", peer_rdma: "peer, RDMA", storage: "storage",
  object_store: "object store", server: "server", unknown: "unknown",
};

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

// A line under a list, which is there only where it says something.
function setMore(element, text) {
  element.hidden = !text;
  setText(element, text);
}

// A name on one line: where it is too long for its place, its beginning is left out.
function setName(element, text) {
  if (element.textContent === text) return;
  const name = make("bdi", "", text);
  name.dir = "ltr";
  element.classList.add("cut");
  element.replaceChildren(name);
}

// Text in which "[MX_CODE]" leads to the code's place on the page of error codes.
function setLinked(element, text) {
  if (element.dataset.text === text) return;
  element.dataset.text = text;
  element.replaceChildren(...text.split(/(\[MX_[A-Z0-9_]+\])/).filter(Boolean).map((part) => (
    /^\[MX_[A-Z0-9_]+\]$/.test(part) ? codeLink(part.slice(1, -1)) : part)));
}

function codeLink(code, text = code) {
  const link = make("a", "code", text);
  link.href = `errors#${code}`;
  return link;
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
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const percent = (part, whole) => (whole > 0 ? Math.min(100, (100 * part) / whole) : 0);
// 100 % only where it is all.
const share = (part, whole) => (whole > 0 ? `${part < whole ? Math.min(99, Math.round((100 * part) / whole)) : 100} %` : "–");
// Our workers are called by 32 hexadecimal digits, of which the first tell them apart; the whole is in the tooltip.
const short = (id) => (/^[0-9a-f]{32}$/.test(id) ? id.slice(0, 12) : id);
// Names of pods begin alike and differ at the end.
const ending = (name, most) => (name.length <= most ? name : `…${name.slice(1 - most)}`);

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const LETTER = 6.6; // pixels of one, about
const ROW = 20;
const AXIS = 22;
const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];

// A row a bar: {label, about, from, until, parts: [[class, seconds]], note}; from and until in seconds.
function timeline(box, bars) {
  const width = Math.max(240, Math.floor(box.clientWidth));
  const key = JSON.stringify([width, bars]);
  if (box.dataset.drawn === key) return;
  box.dataset.drawn = key;
  const letters = Math.min(width < 600 ? 14 : 34, Math.max(...bars.map((bar) => bar.label.length)));
  const left = Math.ceil(letters * LETTER) + 8;
  const room = width - left - 58;
  const most = Math.max(0.001, ...bars.map((bar) => bar.until));
  const step = STEPS.find((seconds) => (most / seconds) * 56 <= room) || 172800;
  const x = (seconds) => left + (room * seconds) / most;
  const height = AXIS + ROW * bars.length;
  const svg = draw("svg", { width, height, role: "img", "aria-label": `${bars.length} replicas on a time axis of ${duration(most)}` });
  for (let at = 0; at <= most; at += step) {
    const text = draw("text", { x: x(at), y: 13, class: "tick" }, at && at < 1 ? `${at.toFixed(1)} s` : at < 120 ? `${+at.toFixed(1)} s` : at < 7200 ? `${+(at / 60).toFixed(1)} min` : duration(at));
    svg.append(draw("line", { x1: x(at), x2: x(at), y1: AXIS - 4, y2: height, class: "grid" }), text);
  }
  bars.forEach((bar, index) => {
    const y = AXIS + ROW * index;
    const row = draw("g", {}, draw("title", {}, bar.about));
    row.append(draw("rect", { x: 0, y, width, height: ROW, class: "hit" }));
    row.append(draw("text", { x: 0, y: y + 14, class: "label" }, ending(bar.label, letters)));
    let at = bar.from;
    for (const [kind, seconds] of bar.parts) {
      if (seconds > 0) row.append(draw("rect", { x: x(at), y: y + 4, width: Math.max(1.5, x(at + seconds) - x(at)), height: ROW - 8, rx: 2, class: kind }));
      at += Math.max(0, seconds);
    }
    row.append(draw("text", { x: width, y: y + 14, class: "note" }, bar.note));
    svg.append(row);
  });
  box.replaceChildren(svg);
}
