// ---- the rollout's chart: divergence above, weight below, over the sampled tokens ----------------------------------
function drawTrace(r) {
  $("chart").hidden = !r.traced || r.sampled.length < 2;
  if ($("chart").hidden) return;
  const sides = shownSets(), apart = difference(), place = places(r);
  const width = Math.max(260, $("chart").clientWidth - 28), left = 40, right = 6, n = r.sampled.length;
  const x = (i) => left + (width - left - right) * (i + 0.5) / n, half = (x(1) - x(0)) / 2;
  const scale = (low, high, top, height) => (v) => top + height * (1 - (v - low) / (high - low || 1));
  const divergences = sides.map((set) => credit(r, "d", set));
  const heights = apart ? [weightAt(r)] : sides.map((set) => credit(r, "w", set));
  const base = apart ? 0 : 1;
  const dLow = Math.min(...divergences.map((d) => extent(d)[0])), dHigh = Math.max(...divergences.map((d) => extent(d)[1]));
  const wLow = apart ? Math.min(-1, extent(heights[0])[0]) : 0;
  const wHigh = apart ? Math.max(1, extent(heights[0])[1]) : Math.max(2, ...heights.map((w) => extent(w)[1]));
  const floor = Math.min(0, dLow), ceiling = Math.max(0.1, dHigh);
  const panels = { d: [32, 66], w: [128, 54] };
  const yd = scale(floor, ceiling, ...panels.d), yw = scale(wLow, wHigh, ...panels.w);
  const top = panels.d[0] - 6, bottom = panels.w[0] + panels.w[1];
  const picture = svg("svg", { viewBox: `0 0 ${width} 204`, height: "204", role: "img",
    "aria-label": `Divergence from ${number(dLow, 2)} to ${number(dHigh, 2)} nats and weight of ${n} sampled tokens` });
  for (const set of apart ? sides : [sides[0]]) for (const [anchor, start, end] of r.credits[set].segments) {
    const from = x(place[start]) - half, to = x(place[end - 1]) + half;
    picture.append(svg("rect", { x: from, y: top, width: Math.max(1.5, to - from), height: bottom - top,
      style: "fill: color-mix(in oklab, var(--ink) 9%, transparent)" }));
    if (anchor !== start) continue;
    picture.append(svg("use", { href: "#flag", x: from, y: top - 7, width: 9, height: 10, style: "fill: var(--ink)" }));
  }
  for (const [mark, start, end] of r.decisions) {
    const from = x(place[start]) - half, to = x(place[end - 1]) + half;
    picture.append(svg("rect", { class: mark < 0 ? "wrong-bar" : "right-bar", x: from, y: mark < 0 ? bottom - 1 : bottom + 1,
      width: Math.max(2, to - from), height: mark < 0 ? 4 : 2 }));
  }
  let free = 0;  // x from which the next turn label fits
  for (const [turn, start] of r.sections) if (turn >= 0) {
    const at = x(place[start]) - half;
    picture.append(svg("line", { x1: at, x2: at, y1: top, y2: bottom, style: "stroke: var(--line)",
      "stroke-dasharray": "3 3" }));
    if (at < free || at > width - 44) continue;
    picture.append(svg("text", { x: at + 2, y: bottom + 17 }, `turn ${turn}`));
    free = at + 50;
  }
  const line = (column, y) => "M" + [...column].map((v, i) => (v === v ? `${x(i).toFixed(1)} ${y(v).toFixed(1)}` : null))
    .filter(Boolean).join("L");
  const steps = (column, y) => [...column].map((v, i) =>
    `L${(x(i) - half).toFixed(1)} ${y(v === v ? v : base).toFixed(1)}H${(x(i) + half).toFixed(1)}`).join("");
  const axis = (ticks, y) => {
    for (const v of ticks) picture.append(
      svg("line", { x1: left, x2: width - right, y1: y(v), y2: y(v), style: "stroke: var(--line)" }),
      svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, short(Math.round(v * 100) / 100)));
  };
  axis(floor < -0.15 * (ceiling - floor) ? [floor, 0, ceiling] : [0, ceiling], yd);
  axis(apart ? [wLow, 0, wHigh] : wHigh > 2.5 ? [0, 1, wHigh] : [0, 1, 2], yw);
  const both = sides.length > 1, names = sides.map((set) => data.sets[set]);
  const equal = both && divergences[0].every((v, i) => Object.is(v, divergences[1][i])) ? " (equal)" : "";
  const room = Math.floor((width - left - right - 70) / 6.2) - `, dashed: ${equal}`.length;  // characters
  const [first, second] = names.map((name, k) => {
    const most = Math.max(8, room / 2, room - names[1 - k]?.length);
    return name.length > most ? `${name.slice(0, most - 1)}…` : name;
  });
  picture.append(svg("text", { class: "name", x: left, y: 11 }, "Divergence",
    both ? svg("tspan", { class: "aside" }, ` — ${first}, dashed: ${second}${equal}`) : null,
    both ? svg("title", {}, `${names[0]}, dashed: ${names[1]}`) : null),
    svg("text", { class: "name", x: left, y: panels.w[0] - 8 }, apart ? "Weight, right − left" : "Weight"));
  const area = `M${left} ${yw(base)}${steps(heights[0], yw)}L${width - right} ${yw(base)}Z`;
  picture.append(svg("defs", {},
    svg("clipPath", { id: "above" }, svg("rect", { x: 0, y: 0, width, height: yw(base) })),
    svg("clipPath", { id: "below" }, svg("rect", { x: 0, y: yw(base), width, height: 204 }))),
    svg("path", { d: area, "clip-path": "url(#above)", style: "fill: var(--hi)" }),
    svg("path", { d: area, "clip-path": "url(#below)", style: "fill: var(--lo)" }),
    ...divergences.map((d, k) => svg("path", { d: line(d, yd), class: k ? "curve second" : both ? "curve under" : "curve" })));
  if (heights[1]) picture.append(svg("path", { d: "M" + steps(heights[1], yw).slice(1), class: "curve second" }));
  for (const column of heights) column.forEach((v, i) => {  // a missing weight is not a weight of 1
    if (v === v) return;
    picture.append(svg("rect", { class: "nan-bar", x: x(i) - half, y: panels.w[0], width: 2 * half, height: panels.w[1] }));
  });
  const cursor = svg("line", { y1: top, y2: bottom, style: "stroke: var(--focus); stroke-width: 1.5",
    visibility: "hidden" });
  picture.append(cursor);
  moveCursor = (t) => {
    cursor.setAttribute("visibility", place[t] < 0 ? "hidden" : "visible");
    if (place[t] >= 0) { cursor.setAttribute("x1", x(place[t])); cursor.setAttribute("x2", x(place[t])); }
  };
  const at = (event) => {
    const box = picture.getBoundingClientRect(), share = (event.clientX - box.left) * width / box.width;
    return r.sampled[Math.max(0, Math.min(n - 1, Math.floor((share - left) / (width - left - right) * n)))];
  };
  picture.addEventListener("pointermove", (event) => { hovered = at(event); inspect(); });
  picture.addEventListener("pointerleave", () => { hovered = null; inspect(); });
  picture.addEventListener("click", (event) => select(at(event)));
  $("chart").replaceChildren(picture);
}
