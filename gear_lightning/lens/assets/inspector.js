// ---- inspector ------------------------------------------------------------------------------------------------------
const nodeOf = (t) => nodes[t]?.[lane] ?? nodes[t]?.[0] ?? null;

function select(t, focus = true) {
  for (const node of nodes[selected] ?? []) {
    node.tabIndex = -1;
    node.classList.remove("now");
    node.removeAttribute("aria-describedby");
  }
  selected = t;
  const node = t === null ? null : nodeOf(t);
  if (node) {
    for (const twin of nodes[t]) twin.classList.add("now");
    node.tabIndex = 0;
    node.setAttribute("aria-describedby", "inspector");
    if (focus) {
      const box = node.closest("details");
      if (box) box.open = true;
      node.focus({ preventScroll: true });
      node.scrollIntoView({ block: "nearest" });
    }
  }
  inspect();
}
function inspect() {
  const r = current, t = hovered ?? selected;
  if (!r.traced || t === null) {
    $("inspector").replaceChildren(el("p", { class: "muted" }, "No tokens were recorded for this rollout."));
    return;
  }
  const id = data.vocabulary[ids(r)[t]][0], place = places(r)[t], sides = shownSets();
  const chance = (x) => (known(x) ? [number(x), " ", el("small", {}, `${(100 * Math.exp(x)).toPrecision(3)} %`)] : ["–"]);
  const at = (key) => evidence(r, key)?.[place] ?? null;
  const rows = [["token id", [String(id)]], ["position", [String(t)]]];
  const piece = el("div", { class: "piece" }, tokenText(r, t)), brief = el("div", { class: "brief num" }, "no credit");
  if (place < 0) {
    rows.push(["part", [t < r.sections[0][2] ? "prompt" : "observation"]], ["credit", ["none"]]);
  } else {
    const mark = decided(r)[t], columns = sides.map((set) => ["w", "a", "d"].map((key) => credit(r, key, set)[place]));
    const spreading = reach(r);
    brief.textContent = `weight ${columns.map((c, k) => (sides.length > 1 ? `${"LR"[k]} ` : "") + number(c[0], 2)).join(", ")}`;
    paint(piece, difference() ? 1 + columns[1][0] - columns[0][0] : columns[0][0], spreading);
    rows.push(["turn", [String(turnOf(r)[t])]], ["sampled token", [`${place + 1} of ${r.sampled.length}`]]);
    if (mark) rows.push(["decision", [mark < 0 ? "✗ wrong" : "✓ right"]]);
    rows.push(null);
    const where = (set) => ((a) => (a < 0 ? "no segment" : a === t ? `${t} (this token)` : String(a)))(anchorOf(r, set)[t]);
    if (sides.length === 1) {
      rows.push(["weight", [el("strong", {}, number(columns[0][0]))]],
        ["token advantage", [number(columns[0][1], 3, true)]], ["anchor", [where(sides[0])]], null,
        ["divergence", [number(columns[0][2], 3, true)]]);
    } else {
      rows.push(["", [el("table", {},
        el("tr", {}, el("td"), ...sides.map((set, k) => el("th", { title: data.sets[set] }, "LR"[k])),
          el("th", { title: "right minus left" }, "R − L")),
        ...["weight", "advantage", "divergence"].map((name, k) => el("tr", {}, el("th", {}, name),
          ...columns.map((c) => el("td", {}, number(c[k], 3, k > 0))),
          el("td", {}, number(columns[1][k] - columns[0][k], 3, true)))),
        el("tr", {}, el("th", {}, "anchor"),
          ...sides.map((set) => el("td", {}, where(set).replace("no segment", "–").replace(/.*this token.*/, "this"))),
          el("td"))),
      el("p", { class: "sides" }, ...sides.flatMap((set, k) => [el("strong", {}, "LR"[k]), ` ${data.sets[set]}`, el("br")]),
        el("strong", {}, "R − L"), " right minus left")]], null);
    }
    rows.push(["entropy", [number(at("h"))]]);
    if (evidence(r, "e")) rows.push(["teacher's entropy", [number(at("e"))]]);
    rows.push(["log p policy", chance(at("p"))],
      ["log p teacher", r.columns.t === undefined ? ["no teacher"] : chance(at("t"))],
      ["log p sampler", chance(at("s"))]);
  }
  const list = el("dl");
  for (const row of rows) {
    if (row && row[0] === "") list.append(el("dd", { class: "across" }, ...row[1]));
    else if (row) list.append(el("dt", {}, row[0]), el("dd", {}, ...row[1]));
    else list.append(el("div", { class: "rule" }));
  }
  const heading = el("h3", { class: "muted" }, place < 0 ? "Token" : "Sampled token", el("small", {}, " · nats"));
  $("inspector").replaceChildren(heading, piece, brief, list);
  moveCursor(t);
}

// ---- keyboard and pointer navigation between tokens --------------------------------------------------------------------
$("tokens").addEventListener("pointerover", (event) => {
  const node = event.target.closest(".tok");
  if (node && node.token !== hovered) { hovered = node.token; inspect(); }
});
$("tokens").addEventListener("pointerleave", () => { hovered = null; if (current.traced) inspect(); });
$("tokens").addEventListener("focusin", (event) => {
  const node = event.target.closest(".tok");
  if (!node) return;
  lane = node.lane;
  if (node.token !== selected) { hovered = null; select(node.token, false); }
});
$("tokens").addEventListener("click", (event) => event.target.closest(".tok")?.focus());
function neighbor(t, by) {
  for (t += by; t >= 0 && t < nodes.length; t += by) if (!nodeOf(t).closest("details:not([open])")) return t;
  return null;
}
function nextLine(t, by) {
  const here = nodeOf(t).getBoundingClientRect(), middle = here.left + Math.min(here.width, 40) / 2;
  let best = null, line = null, gap = Infinity;
  for (let u = neighbor(t, by); u !== null; u = neighbor(u, by)) {
    const box = nodeOf(u).getBoundingClientRect();
    if (Math.abs(box.top - here.top) < here.height / 2) continue;
    if (line !== null && Math.abs(box.top - line) > here.height / 2) break;
    line ??= box.top;
    const distance = Math.abs(box.left + Math.min(box.width, 40) / 2 - middle);
    if (distance < gap) { gap = distance; best = u; }
  }
  return best;
}
$("tokens").addEventListener("keydown", (event) => {
  if (selected === null || !event.target.closest(".tok") || event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = {
    ArrowRight: () => neighbor(selected, 1), ArrowLeft: () => neighbor(selected, -1),
    ArrowDown: () => nextLine(selected, 1), ArrowUp: () => nextLine(selected, -1),
    Home: () => current.sampled[0], End: () => current.sampled.at(-1),
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  const t = moves[event.key]() ?? null;
  if (t !== null) { hovered = null; select(t); }
});
function nextAnchor(back) {
  const from = selected ?? -1, all = marks(current), inText = document.activeElement?.closest(".tok");
  hovered = null;
  if (!inText) select(back ? all.at(-1) : all[0]);
  else if (back) select(all.findLast((t) => t < from) ?? all.at(-1));
  else select(all.find((t) => t > from) ?? all[0]);
}
