"use strict";
// Model output is only added to the page as text nodes: never build markup from data.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function put(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}
const el = (tag, attributes = {}, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => put(document.createElementNS(SVG, tag), attributes, children);

const known = (value) => typeof value === "number" && Number.isFinite(value);
function number(value, digits = 3, sign = false) {
  if (!known(value)) return "–";
  const text = value.toFixed(digits);
  return (sign && Number(text) > 0 ? "+" : "") + text.replace("-", "−");
}
const short = (value) => number(value, 3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
const percent = (value) => (known(value) ? `${Math.round(100 * value)} %` : "–");
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v === v) { if (v < low) low = v; if (v > high) high = v; }
  return low > high ? [1, 1] : [low, high];
}

// ---- color: blue below weight 1, orange above; the underline shows the same without color --------------------------
function paint(node, weight, spread = 1) {
  if (weight !== weight) node.classList.add("nan");
  const away = Math.abs(weight - 1);
  if (!(away >= 0.005)) return node;
  node.classList.add(weight > 1 ? "hi" : "lo");
  node.style.setProperty("--t", `${Math.round(100 * Math.min(1, away / spread))}%`);
  node.style.setProperty("--u", `${Math.min(4, Math.round(4 * away))}px`);
  return node;
}
function flag(text, label) {
  return el("span", { class: "flag", "aria-label": label },
    svg("svg", { "aria-hidden": "true" }, svg("use", { href: "#flag" })), text);
}
const GLYPHS = { solved: "✓", failed: "✗", unscored: "–" };

// ---- view state, stored in the address ----------------------------------------------------------------------------
const state = { rollout: null, left: 0, right: 0, view: "both", tab: "tokens", stretched: false };
// The sets of credit on the page, left first.
const shownSets = () => (data.sets.length < 2 || state.view === "left" || state.left === state.right
  ? [state.left] : state.view === "right" ? [state.right] : [state.left, state.right]);
const difference = () => state.view === "difference" && shownSets().length === 2;
