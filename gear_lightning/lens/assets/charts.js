// ---- charts of the filter and of the selected rollout ----------------------------------------------------------------
const W = 320, H = 190, AREA = { left: 38, right: 8, top: 10, bottom: 34 };
const axisX = (share) => AREA.left + share * (W - AREA.left - AREA.right);
const axisY = (share) => H - AREA.bottom - share * (H - AREA.top - AREA.bottom);

function drawCharts() {
  const all = found.filter((r) => r.traced && r.sampled.length), sets = shownSets();
  const scopes = [["filter", `Filter: ${count(found.length, "rollout")}`, all]];
  if (current?.traced && current.sampled.length) scopes.push(["one", `Selected: ${current.task_id}, rollout ${current.rollout}`, [current]]);
  $("charts").replaceChildren(...scopes.map(([id, title, list]) => el("section", { class: "card scope", id: `charts-${id}` },
    el("h3", {}, title),
    el("div", { class: sets.length > 1 ? "figures paired" : "figures" }, ...figures(list, sets, id === "one")))));
}
function figures(list, sets, one) {
  if (!list.length) return [el("p", { class: "muted" }, "No rollout has credit.")];
  const kinds = [positionFigure, entropyFigure];
  if (list.some((r) => r.decisions.length)) kinds.push(decisionFigure);
  const name = (set) => (data.sets.length > 1 ? `${data.sets[set]}: ` : "");
  return kinds.flatMap((draw) => sets.map((set) => draw(list, set, name(set), one)));
}
// A figure with its numbers in a table below, which is built when it is opened.
function figure(kind, title, label, picture, caption, head, rows) {
  const box = el("details", {}, el("summary", {}, "Numbers"));
  box.addEventListener("toggle", () => {
    if (box.open && box.children.length === 1) box.append(el("div", { class: "wide-table" }, el("table", {},
      el("tr", {}, ...head.map((h) => el("th", {}, h))),
      ...rows().map((row) => el("tr", {}, ...row.map((v) => el("td", {}, typeof v === "string" ? v
        : Number.isInteger(v) ? String(v) : number(v, 4))))))));
  });
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", label);
  return el("figure", { class: kind }, el("h4", {}, title), picture, el("figcaption", {}, ...caption), box);
}
const canvas = () => svg("svg", { viewBox: `0 0 ${W} ${H}` });
const words = (x, y, text, anchor = "middle") => svg("text", { x, y, "text-anchor": anchor }, text);
const rule = (x1, y1, x2, y2) => svg("line", { x1, y1, x2, y2, class: "grid" });

// (a) weight over the relative position
function positionFigure(list, set, name, one) {
  const groups = [["solved", "solved"], ["failed", "not solved"]]
    .map(([kind, word]) => ({ kind, word, list: list.filter((r) => r.kind === kind) })).filter((g) => g.list.length);
  if (!groups.length) groups.push({ kind: "failed", word: "no reward", list });
  for (const g of groups) g.bins = weightProfile(g.list, set);
  const high = Math.max(1.2, ...groups.flatMap((g) => g.bins.map((b) => Math.max(b.q3, b.mean))).filter(known));
  const low = Math.min(0.8, ...groups.flatMap((g) => g.bins.map((b) => Math.min(b.q1, b.mean))).filter(known));
  const picture = canvas(), y = (v) => axisY((v - low) / (high - low)), x = (b) => axisX((b + 0.5) / BINS);
  for (const v of [low, 1, high]) picture.append(rule(AREA.left, y(v), W - AREA.right, y(v)),
    words(AREA.left - 5, y(v) + 4, number(v, 2), "end"));
  picture.append(words(AREA.left, H - 18, "start", "start"), words(W - AREA.right, H - 18, "end", "end"),
    words(axisX(0.5), H - 4, "position among the sampled tokens"));
  for (const g of groups) {
    const there = g.bins.map((bin, b) => ({ ...bin, b })).filter((bin) => bin.n);
    const path = (of) => there.map((bin) => `${x(bin.b).toFixed(1)} ${y(of(bin)).toFixed(1)}`);
    picture.append(svg("path", { class: `band ${g.kind}`,
      d: `M${[...path((bin) => bin.q3), ...path((bin) => bin.q1).reverse()].join("L")}Z` }),
    svg("path", { class: `mean ${g.kind}`, d: `M${path((bin) => bin.mean).join("L")}` }));
    for (const bin of there) picture.append(g.kind === "solved"
      ? svg("circle", { class: "dot solved", cx: x(bin.b), cy: y(bin.mean), r: 2.4 })
      : svg("rect", { class: "dot failed", x: x(bin.b) - 2.2, y: y(bin.mean) - 2.2, width: 4.4, height: 4.4 }));
  }
  const key = groups.map((g) => el("span", { class: g.kind }, `${g.kind === "solved" ? "● ━" : "■ ┅"} ${g.word}`
    + (one ? "" : ` (${g.list.length})`), " "));
  return figure("position", `${name}weight over the rollout`,
    groups.map((g) => `${g.word}: mean weight ${number(g.bins[0].mean, 2)} at the start, ${number(g.bins.at(-1).mean, 2)} at the end`)
      .join("; "),
    picture, [...key, one || list.length === 1 ? "Line: mean over the tokens of each twentieth; band: their quartiles."
      : "Line: mean over rollouts of their means in each twentieth; band: quartiles."],
    ["part", ...groups.flatMap((g) => ["n", "mean", "q1", "median", "q3"].map((k) => `${g.word} ${k}`))],
    () => groups[0].bins.map((_, b) => [b + 1, ...groups.flatMap((g) => {
      const { n, mean, q1, median, q3 } = g.bins[b];
      return [n, mean, q1, median, q3];
    })]));
}

// (b) entropy against divergence, with the anchors
function entropyFigure(list, set, name) {
  const map = entropyMap(list, set), { low, high, top } = range(set), picture = canvas();
  const most = Math.max(1, ...map.all), wide = (axisX(1) - axisX(0)) / GRID, tall = (axisY(0) - axisY(1)) / GRID;
  for (let c = 0; c < map.all.length; c++) if (map.all[c]) {
    const x = axisX((c % GRID) / GRID), y = axisY(Math.floor(c / GRID) / GRID) - tall;
    const depth = Math.round(12 + 60 * Math.log1p(map.all[c]) / Math.log1p(most));
    picture.append(svg("rect", { class: "cell", x: x.toFixed(1), y: y.toFixed(1), width: wide.toFixed(1), height: tall.toFixed(1),
      style: `fill: color-mix(in oklab, var(--lo) ${depth}%, var(--panel))` }));
  }
  for (let c = 0; c < map.marked.length; c++) if (map.marked[c]) {
    const x = axisX(((c % GRID) + 0.5) / GRID), y = axisY((Math.floor(c / GRID) + 0.5) / GRID);
    picture.append(svg("circle", { class: "ring", cx: x.toFixed(1), cy: y.toFixed(1),
      r: (2 + 4 * Math.sqrt(map.marked[c] / Math.max(...map.marked))).toFixed(1) }));
  }
  const square = (v) => Math.sign(v) * v * v;
  for (const v of [low, 0, high]) if (v === high || v === low || low < -0.1 * high) {
    picture.append(words(AREA.left - 5, axisY((v - low) / (high - low)) + 4, number(square(v), 1), "end"));
  }
  for (const share of [0, 0.5, 1]) {
    picture.append(words(axisX(share), H - 19, number(square(top * share), 2), share === 1 ? "end" : "middle"));
  }
  const zero = axisY((0 - low) / (high - low));
  picture.append(rule(AREA.left, zero, W - AREA.right, zero), rule(AREA.left, axisY(0), AREA.left, axisY(1)),
    words(axisX(0.5), H - 4, "entropy →  (up: divergence; nats, √ scales)"));
  const caption = map.anchors ? [el("strong", {}, percent(map.share)), ` of ${count(map.anchors, "anchor")} (rings) are in the `
    + "fifth of their rollout's tokens with the highest entropy; the expected share by chance is 20 %."] : ["No anchors."];
  if (!map.measured) caption.push(" This rule measured no divergence.");
  return figure("entropy", `${name}anchors against entropy`,
    `${count(map.anchors, "anchor")}, ${percent(map.share)} of them in the top fifth by entropy`, picture, caption,
    ["", "value"], () => [["sampled tokens", map.tokens], ["anchors", map.anchors], ["in the top fifth", map.top],
      ["share", map.share]]);
}

// (c) position of anchors relative to the first wrong decision
function decisionFigure(list, set, name) {
  const map = decisionMap(list, set), picture = canvas(), most = Math.max(1, ...map.bars), n = map.bars.length;
  const wide = (axisX(1) - axisX(0)) / n;
  for (const v of [0, most]) picture.append(rule(AREA.left, axisY(v / most), W - AREA.right, axisY(v / most)),
    words(AREA.left - 5, axisY(v / most) + 4, String(v), "end"));
  map.bars.forEach((v, b) => {
    picture.append(svg("rect", { class: OFFSET_NAMES[b] === "0" ? "bar at" : "bar", x: axisX(b / n) + 1, width: wide - 2,
      y: axisY(v / most), height: axisY(0) - axisY(v / most) }, svg("title", {}, `${OFFSET_NAMES[b]}: ${v}`)));
    if (OFFSET_LABELS.includes(b)) picture.append(words(axisX((b + 0.5) / n), H - 19, OFFSET_NAMES[b]));
  });
  picture.append(words(axisX(0.5), H - 4, "sampled tokens from its first token to the anchor"));
  const caption = map.heavy ? [el("strong", {}, percent(map.mass)), " of the credit (sum of |token advantage|) falls on the first wrong "
    + `decision, which has ${number(100 * map.tokens, 1)} % of the tokens (means of ${count(map.heavy, "rollout")}).`]
    : [`${count(map.judged, "rollout")} with judged decisions, ${map.wrong} with credit on a wrong decision.`];
  return figure("decisions", `${name}anchors from the first wrong decision`,
    `${count(map.anchors, "anchor")}; ${percent(map.mass)} of the credit on the first wrong decision`, picture, caption,
    ["", "value"], () => [["rollouts judged", map.judged], ["with a wrong decision", map.wrong], ["anchors there", map.anchors],
      ["share of credit", map.mass], ["share of tokens", map.tokens],
      ...OFFSET_NAMES.map((text, b) => [text, map.bars[b]])]);
}
