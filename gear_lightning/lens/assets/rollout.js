// ---- one rollout ----------------------------------------------------------------------------------------------------
// nodes[t]: the elements of token t in the document, one for each column of credit
let nodes = [], lane = 0, dimmed = "", selected = null, hovered = null, moveCursor = () => {};

function show(r, t = null) {
  const reading = $("tokens").contains(document.activeElement);
  current = r;
  nodes = []; selected = null; hovered = null; lane = 0; moveCursor = () => {};
  $("name").textContent = String(r.task_id);
  $("place").textContent = `iteration ${r.iteration} · rank ${r.rank} · group ${r.group_id} · rollout ${r.rollout}`;
  drawFacts(r);
  $("error").hidden = !r.error && r.traced;
  $("error").replaceChildren(...(r.error ? [el("strong", {}, "Error: "), String(r.error)] : []),
    ...(r.traced ? []
      : [el("div", {}, "Excluded from training: no tokens and no credit were recorded, only the transcript.")]));
  refresh(t ?? (r.traced ? marks(r)[0] ?? r.sampled[0] ?? 0 : null), reading);
}
// Redraws everything that depends on filters and on the shown sets.
function refresh(t = selected, reading = false) {
  const r = current, charts = state.tab === "charts";
  $("tab-tokens").setAttribute("aria-pressed", String(!charts));
  $("tab-charts").setAttribute("aria-pressed", String(charts));
  document.body.classList.toggle("charts", charts);
  $("top").hidden = !r;
  $("right").hidden = !r || charts;
  $("tokens").hidden = charts || !r;
  $("charts").hidden = !charts;
  mark();
  if (charts) drawCharts();
  if (!r) return;
  drawLegend(r);
  nodes = [];
  dimmed = $("f-turn").value;
  if (charts) $("chart").hidden = true;
  else drawTrace(r);
  $("tokens").replaceChildren(...(charts ? [] : r.traced ? sections(r) : transcript(r)));
  select(t, reading && !charts);
}
// Anchors of all shown sets.
const marks = (r) => [...new Set(shownSets().flatMap((set) => anchors(r, set)))].sort((a, b) => a - b);

function drawFacts(r) {
  const parts = Object.entries(r.reward_parts ?? {})
    .map(([name, x]) => `${name} ${typeof x === "number" ? short(x) : x}`);
  const facts = [
    ["Reward", el("span", {}, short(r.reward), " ", el("small", { class: r.kind }, `${GLYPHS[r.kind]} ${r.kind}`))],
  ];
  if (parts.length) facts.push(["Reward parts", el("small", {}, parts.join(", "))]);
  if (r.traced) {
    const whose = data.sets.length > 1 ? `, ${data.sets[0]}` : "";
    const covered = r.credits[0].segments.reduce((sum, [, start, end]) => sum + end - start, 0);
    facts.push(
      ["Group advantage", number(r.advantage, 3, true)],
      ["Solved in group", short(r.solved)],
      [`Segments${whose}`, String(anchors(r, 0).length)],
      [`Tokens in segments${whose}`, el("span", {}, `${percent(covered / Math.max(1, r.sampled.length))} `,
        el("small", {}, `${covered} of ${r.sampled.length}`))],
      [`Weights${whose}`, credit(r, "w", 0).some(known) ? weights(r, 0).map((w) => number(w, 2)).join(" – ") : "–"],
    );
  }
  facts.push(["Turns", short(r.turns)], ["Status", String(r.status).replaceAll("_", " ")],
    ["Policy version", short(r.policy_version)]);
  $("facts").replaceChildren(...facts.map(([name, fact]) => el("div", {}, el("dt", {}, name), el("dd", {}, fact))));
}
// Distance from weight 1 (for a difference: from 0) at which the color is full.
function reach(r) {
  if (!state.stretched) return 1;
  if (!difference()) return Math.max(...shownSets().map((set) => spread(r, set)));
  return Math.max(0.001, ...extent(weightAt(r)).map(Math.abs));
}
// Weight of each sampled token: of a set, or the difference right minus left.
function weightAt(r, set = null) {
  if (set !== null) return credit(r, "w", set);
  const [left, right] = shownSets().map((s) => credit(r, "w", s));
  return right.map((w, i) => w - left[i]);
}
function drawLegend(r) {
  $("legend").hidden = !r.traced || state.tab === "charts";
  if (!r.traced) return;
  const spreading = reach(r), steps = [-1, -0.6, -0.3, 0, 0.3, 0.6, 1];
  const digits = state.stretched ? 2 : 1, more = state.stretched ? "" : "+";
  const samples = difference()
    ? steps.map((x) => [number(x * spreading, digits, true), 1 + x * spreading])
    : steps.map((x) => [number(Math.max(0, 1 + x * spreading), digits), Math.max(0, 1 + x * spreading)]);
  const sides = shownSets().map((set) => data.sets[set]);
  const missing = shownSets().some((set) => credit(r, "w", set).some((w) => !known(w)));
  const reading = difference() ? `Weight of ${sides[1]} minus weight of ${sides[0]}: orange where ${sides[1]} is higher.`
    : !missing && shownSets().every((set) => spread(r, set) < 0.005) ? "Credit is uniform in this rollout: every sampled token has weight 1."
    : r.advantage > 0 ? "The advantage is positive: orange tokens are reinforced more, blue ones less."
    : r.advantage < 0 ? "The advantage is negative: orange tokens are penalized more, blue ones less."
    : "The advantage is zero or unknown: the weights have no effect.";
  $("legend").replaceChildren(
    el("span", {}, difference() ? "Difference" : "Weight", ...samples.map(([text, w], i) =>
      paint(el("span", { class: "tok num" }, text + (i === 6 ? more : "")), w, spreading))),
    difference() ? el("span", {}, flag("L", "anchor"), flag("R", "anchor"), "anchors of left and right")
      : el("span", {}, el("span", { class: "seg tok" }, flag("1.90", "anchor"), "anchor and its segment")),
    ...(r.decisions.length ? [el("span", {}, el("span", { class: "tok wrong" }, "✗ wrong"),
      el("span", { class: "tok right" }, "✓ right"), "decision")] : []),
    ...(missing ? [el("span", {}, el("span", { class: "tok nan" }, "token"), "weight is not finite")] : []),
    el("span", { class: "muted" }, "gray: prompt and observations"),
    el("span", { class: "muted" }, "⏎ line break, · space, ⇥ tab"),
    el("span", { id: "reading" }, reading));
}
function sections(r) {
  const spreading = reach(r), turnWanted = wantedTurn(), columns = difference() ? [null] : shownSets();
  return r.sections.map(([turn, start, end]) => {
    const title = [el("small", {}, ` · ${count(end - start, "token")}`)];
    if (turn < 0) {
      const text = el("div", { class: "text" });
      for (let t = start; t < end; t++) text.append(token(r, t, null, spreading));
      const box = el("details", { class: "context" },
        el("summary", {}, start ? "Observation" : "Prompt", ...title), text);
      box.open = end - start <= 800;
      return box;
    }
    const name = (set) => (set === null ? "right − left" : data.sets[set]);
    const texts = columns.map((set) => el("div", { class: "lane" },
      data.sets.length > 1 ? el("div", { class: "set" }, name(set)) : null, spans(r, start, end, set, spreading)));
    const dim = turnWanted !== null && turn !== turnWanted ? " dim" : "";
    return el("section", { class: `turn${dim}` }, el("h3", {}, `Turn ${turn}`, ...title),
      columns.length > 1 ? el("div", { class: "pair" }, ...texts) : texts[0]);
  });
}
function spans(r, start, end, set, spreading) {
  const text = el("div", { class: "text" }), anchor = set === null ? null : anchorOf(r, set);
  for (let t = start; t < end; ) {
    let stop = t + 1;
    while (anchor && stop < end && anchor[stop] === anchor[t]) stop++;
    const home = anchor && anchor[t] >= 0 ? text.appendChild(el("span", { class: "seg" })) : text;
    for (; t < stop; t++) home.append(token(r, t, set, spreading));
  }
  return text;
}
function token(r, t, set, spreading) {
  const node = el("span", { class: "tok", tabindex: "-1" }, tokenText(r, t)), place = places(r)[t];
  node.token = t;
  node.lane = (nodes[t] ??= []).push(node) - 1;
  if (place < 0) return node;
  if (set === null) {
    const sides = shownSets(), more = credit(r, "w", sides[1])[place] - credit(r, "w", sides[0])[place];
    paint(node, 1 + more, spreading);
    const at = sides.map((s) => anchorOf(r, s)[t] === t);
    if (at[1]) node.prepend(flag("R", `anchor of ${data.sets[sides[1]]}`));
    if (at[0]) node.prepend(flag("L", `anchor of ${data.sets[sides[0]]}`));
    if (at[0] || at[1]) node.classList.add("anchor");
  } else {
    const weight = credit(r, "w", set)[place];
    paint(node, weight, spreading);
    if (anchorOf(r, set)[t] === t) {
      node.classList.add("anchor");
      node.prepend(flag(number(weight, 2), `anchor, weight ${number(weight, 2)}`));
    }
  }
  const mark = decided(r)[t];
  if (mark) {
    node.classList.add(mark < 0 ? "wrong" : "right");
    if (decided(r)[t - 1] !== mark) {
      node.prepend(el("span", { class: "verdict", "aria-label": mark < 0 ? "wrong decision" : "right decision" },
        mark < 0 ? "✗" : "✓"));
    }
  }
  return node;
}
function transcript(r) {
  return (r.messages ?? []).map((message) => {
    const { role, content, ...rest } = message;
    const said = typeof content === "string" ? content : content ? JSON.stringify(content, null, 1) : "";
    const more = Object.entries(rest).filter(([, x]) => x !== null && x !== "" && !(Array.isArray(x) && !x.length))
      .map(([name, x]) => `${name}: ${typeof x === "string" ? x : JSON.stringify(x)}`);
    return el("section", { class: "turn message" }, el("h3", {}, String(role ?? "?")),
      el("div", { class: "text" }, [said, ...more].filter(Boolean).join("\n")));
  });
}
