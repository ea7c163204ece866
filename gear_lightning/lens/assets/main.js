// ---- address: selection, filters and view; back and forward restore them ---------------------------------------------
const VIEWS = [["both", "side by side"], ["difference", "difference"], ["left", "left only"], ["right", "right only"]];
const DEFAULTS = { left: String(data.opens[0]), right: String(data.opens[1]), view: "both", tab: "tokens" };

function address() {
  const parts = new URLSearchParams();
  if (current) parts.set("r", current.key);
  for (const name of CONTROLS) if ($(`f-${name}`).value) parts.set(name, $(`f-${name}`).value);
  for (const [name, usual] of Object.entries(DEFAULTS)) if (String(state[name]) !== usual) parts.set(name, state[name]);
  return `#${parts}`;
}
function remember(push) {
  const here = address();
  $("link").setAttribute("href", here);
  if (here === location.hash) return;
  try { history[push ? "pushState" : "replaceState"](null, "", here); } catch { /* a sandboxed page has no address */ }
}
function restore() {
  const hash = location.hash.slice(1), parts = new URLSearchParams(hash.includes("=") ? hash : `r=${hash}`);
  for (const name of CONTROLS) {
    $(`f-${name}`).value = parts.get(name) ?? "";
    if ($(`f-${name}`).value === "" && $(`f-${name}`).options) $(`f-${name}`).selectedIndex = 0;  // the choice does not exist
  }
  for (const side of ["left", "right"]) {
    const set = Number(parts.get(side) ?? DEFAULTS[side]);
    state[side] = data.sets[set] === undefined ? Number(DEFAULTS[side]) : set;
  }
  state.view = VIEWS.some(([name]) => name === parts.get("view")) ? parts.get("view") : "both";
  state.tab = parts.get("tab") === "charts" ? "charts" : "tokens";
  drawSets();
  apply();
  const telling = (r) => anchors(r, state.left).length && spread(r, state.left) > 0.1;
  const chosen = rollouts.find((r) => r.key === parts.get("r"))
    ?? found.find((r) => telling(r) && r.kind === "failed") ?? found.find(telling)
    ?? found.find((r) => anchors(r, state.left).length) ?? found[0] ?? rollouts[0];
  if (chosen) show(chosen);
  else refresh();
  $("link").setAttribute("href", address());
}
function drawSets() {
  $("sets").hidden = data.sets.length < 2;
  $("s-left").value = String(state.left);
  $("s-right").value = String(state.right);
  $("s-view").value = state.view;
}

// ---- events ---------------------------------------------------------------------------------------------------------
for (const side of ["left", "right"]) {
  $(`s-${side}`).append(...data.sets.map((name, set) => el("option", { value: set }, name)));
  $(`s-${side}`).addEventListener("change", () => { state[side] = Number($(`s-${side}`).value); filtered(false, true); });
}
$("s-view").append(...VIEWS.map(([value, text]) => el("option", { value }, text)));
$("s-view").addEventListener("change", () => { state.view = $("s-view").value; refresh(); remember(true); });
function tab(name) {
  state.tab = name;
  refresh();
  remember(true);
}
$("tab-tokens").addEventListener("click", () => tab("tokens"));
$("tab-charts").addEventListener("click", () => tab("charts"));
$("list").addEventListener("scroll", drawList);
$("list").addEventListener("keydown", (event) => {
  const far = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1), at = found.indexOf(current);
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: Math.min(far, found.length - 1 - at), PageUp: -Math.min(far, at),
    Home: -at, End: found.length - 1 - at }[event.key];
  if (by === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  step(by, !event.repeat);
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j" || event.key === "n") step(1, !event.repeat);
  else if (event.key === "k" || event.key === "p") step(-1, !event.repeat);
  else if (event.key === "c") tab(state.tab === "charts" ? "tokens" : "charts");
  else if (event.key === "/") { event.preventDefault(); $("f-q").focus(); }
  else if (event.key.toLowerCase() === "a" && state.tab === "tokens" && current && marks(current).length) nextAnchor(event.shiftKey);
});
$("prev").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
function fold(folded) {  // the panel of a token, only on a narrow screen
  document.body.classList.toggle("folded", folded);
  $("fold").setAttribute("aria-expanded", String(!folded));
  $("fold").textContent = folded ? "More" : "Less";
}
$("fold").addEventListener("click", () => fold(!document.body.classList.contains("folded")));
$("stretch").addEventListener("click", () => {
  state.stretched = !state.stretched;
  $("stretch").setAttribute("aria-pressed", String(state.stretched));
  if (current) refresh();
});
window.addEventListener("popstate", () => { if (address() !== location.hash) restore(); });
window.addEventListener("hashchange", () => { if (address() !== location.hash) restore(); });

const themes = ["auto", "light", "dark"];
function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("credit-map-theme", name); } catch { /* some browsers have no storage for local files */ }
}
$("theme").addEventListener("click", () =>
  theme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]));
let drawn = 0;
new ResizeObserver(() => {
  const width = $("chart").clientWidth;
  if (current && width && width !== drawn) { drawn = width; drawTrace(current); if (current.traced) inspect(); }
  drawList();
}).observe(document.querySelector("main"));

// ---- start ----------------------------------------------------------------------------------------------------------
let stored = "auto";
try { stored = localStorage.getItem("credit-map-theme") ?? "auto"; } catch { /* as above */ }
theme(themes.includes(stored) ? stored : "auto");
$("keys").append(...[["j", " "], ["k", " next, previous rollout"], null, ["/", " search "], ["c", " charts"], null,
  ["a", " "], ["A", " next, previous anchor"], null, ["←", " "], ["→", " "], ["↑", " "], ["↓", " token by token"]]
  .flatMap((k) => (k ? [el("kbd", {}, k[0]), k[1]] : [el("br")])));
const iterations = rollouts.map((r) => r.iteration);
$("scope").textContent = rollouts.length === 0 ? "No rollouts"
  : `${count(rollouts.length, "rollout")} of ${iterations[0] === iterations.at(-1) ? `iteration ${iterations[0]}`
    : `iterations ${iterations.at(-1)} to ${iterations[0]}`}, newest first`;
if (data.left_out) $("scope").textContent += `; ${count(data.left_out, "older rollout")} omitted`;
fold(true);
drawFilters();
restore();
readAhead();
document.documentElement.dataset.ready ??= "shown";
