// ---- filters ----------------------------------------------------------------------------------------------------------
const CONTROLS = ["q", "task", "result", "low", "high", "turn", "iteration", "status", "credit"];
const ROW = 62;  // pixels, as in the style
let found = rollouts, current = null;

function choices(id, any, options) {
  $(id).replaceChildren(...[["", any], ...options].map(([value, text]) => el("option", { value }, text)));
}
function drawFilters() {
  const every = (of) => [...new Set(rollouts.flatMap(of))];
  const plainly = (values) => values.map((v) => [String(v), String(v)]);
  $("tasks").append(...every((r) => String(r.task_id)).map((value) => el("option", { value })));
  choices("f-result", "any", [["solved", "solved"], ["failed", "not solved"], ["unscored", "no reward"]]);
  const turns = every((r) => [...r.turns_seen]).sort((a, b) => a - b).slice(0, 500);
  choices("f-turn", "all", plainly(turns));
  choices("f-iteration", "all", plainly(every((r) => r.iteration)));
  choices("f-status", "any", every((r) => String(r.status)).map((v) => [v, v.replaceAll("_", " ")]));
  choices("f-credit", "any", [["segments", "segments"], ["spread", "weights vary"], ["none", "none"]]);
  for (const name of CONTROLS) {
    $(`f-${name}`).addEventListener("input", () => filtered(name === "q" || name === "task"));
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("clear").addEventListener("click", () => {
    for (const name of CONTROLS) $(`f-${name}`).value = "";
    filtered(false);
  });
}
const wantedTurn = () => ($("f-turn").value === "" ? null : Number($("f-turn").value));

function matching() {
  const on = Object.fromEntries(CONTROLS.map((name) => [name, $(`f-${name}`).value]));
  const words = (on.q.toLowerCase().match(/"[^"]+"|\S+/g) ?? [])
    .map((word) => (word.length > 1 && word.endsWith('"') ? word.slice(1, -1) : word).replace(/\s+/g, " "));
  const task = on.task.trim().toLowerCase(), whole = rollouts.some((r) => r.name === task);
  const low = on.low === "" ? null : Number(on.low), high = on.high === "" ? null : Number(on.high);
  const turn = wantedTurn(), left = state.left;
  return rollouts.filter((r) => (whole ? r.name === task : r.name.includes(task))
      && (on.result === "" || r.kind === on.result)
      && (low === null || (known(r.reward) && r.reward >= low))
      && (high === null || (known(r.reward) && r.reward <= high))
      && (turn === null || r.turns_seen.has(turn))
      && (on.iteration === "" || String(r.iteration) === on.iteration)
      && (on.status === "" || String(r.status) === on.status)
      && (on.credit !== "segments" || anchors(r, left).length > 0)
      && (on.credit !== "spread" || (r.traced && spread(r, left) >= 0.005))
      && (on.credit !== "none" || !r.traced)
      && words.every((word) => searchText(r).includes(word)));
}
// After a change of a filter: update the list, and show another rollout if the shown one does not match.
function filtered(typing, redraw = state.tab === "charts" || dimmed !== $("f-turn").value) {
  apply();
  if (found.length && !found.includes(current)) show(found[0]);
  else if (redraw) refresh();
  else mark();
  remember(!typing);
}
function apply() {
  found = matching();
  const changed = CONTROLS.some((name) => $(`f-${name}`).value !== "");
  $("count").textContent = `${found.length.toLocaleString("en")} of ${count(rollouts.length, "rollout")}`;
  $("clear").disabled = !changed;
}

// ---- list: only the visible rows are in the document -----------------------------------------------------------------
const spacer = el("div", { class: "spacer", role: "presentation" });
const empty = el("p", { class: "empty" }, "No rollout matches.");
function strip(r) {
  const bins = 40, w = credit(r, "w", state.left), stops = [];
  for (let b = 0; b < bins && w.length; b++) {
    let far = 0;
    for (let i = Math.floor(b * w.length / bins); i <= Math.min(w.length - 1, (b + 1) * w.length / bins - 1e-9); i++) {
      if (Math.abs(w[i] - 1) > Math.abs(far)) far = w[i] - 1;
    }
    const end = far > 0 ? "hi" : "lo";
    stops.push(`color-mix(in oklab, var(--${end}) ${Math.min(100, Math.round(Math.abs(far) * 100))}%, var(--line)) `
      + `${100 * b / bins}% ${100 * (b + 1) / bins}%`);
  }
  const bar = el("span", { class: "strip" });
  if (stops.length) bar.style.background = `linear-gradient(to right, ${stops.join(",")})`;
  return bar;
}
function listRow(r, at) {
  const row = el("div", { class: "row", role: "option", id: `row-${at}`, "aria-selected": String(r === current),
    "aria-setsize": found.length, "aria-posinset": at + 1 },
    el("span", { class: r.kind, title: r.kind, "aria-label": r.kind }, GLYPHS[r.kind]),
    el("span", { class: "task", title: String(r.task_id) }, String(r.task_id)),
    el("span", { class: "num", title: "reward" }, short(r.reward)),
    el("span", { class: "where" }, `it ${r.iteration} · rollout ${r.rollout} · ${String(r.status).replaceAll("_", " ")}`
      + (r.traced ? "" : " · no credit")),
    r.traced ? strip(r) : null);
  row.style.top = `${at * ROW}px`;
  row.addEventListener("click", () => { show(r); remember(true); });
  return row;
}
function drawList() {
  const list = $("list");
  if (!found.length) return list.replaceChildren(empty);
  spacer.style.height = `${found.length * ROW}px`;
  const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 3);
  const to = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 3);
  spacer.replaceChildren(...found.slice(from, to).map((r, i) => listRow(r, from + i)));
  if (spacer.parentNode !== list) list.replaceChildren(spacer);
  const at = found.indexOf(current);
  if (at >= from && at < to) list.setAttribute("aria-activedescendant", `row-${at}`);
  else list.removeAttribute("aria-activedescendant");
}
function mark() {
  const at = found.indexOf(current), list = $("list");
  if (at >= 0) {
    spacer.style.height = `${found.length * ROW}px`;  // before scrolling, which needs the full height
    if (spacer.parentNode !== list) list.replaceChildren(spacer);
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
  }
  drawList();
  $("prev").disabled = found.length === 0 || at === 0;
  $("next").disabled = found.length === 0 || at === found.length - 1;
}
function step(by, push = true) {
  const at = found.indexOf(current), next = at < 0 ? 0 : at + by;
  if (next < 0 || next >= found.length) return;
  show(found[next]);
  remember(push);
}
