// ---- numbers of the charts: a summary of each rollout, computed once, and sums of summaries -------------------------
const BINS = 20;
const GRID = 24;  // cells along each axis of entropy against divergence
const OFFSETS = [-50, -20, -10, -5, -2, -1, 0, 1, 2, 3, 6, 11, 21, 51];  // smallest offset of each bar except the first
const OFFSET_NAMES = ["<−50", "−50…", "−20…", "−10…", "−5…−3", "−2", "−1", "0", "1", "2", "3…5", "…10", "…20", "…50", ">50"];

const OFFSET_LABELS = [0, 3, 5, 7, 9, 11, 14];  // the bars whose names fit

// As numpy's default: linear interpolation between the two nearest. The values must be sorted.
function quantile(sorted, q) {
  const at = (sorted.length - 1) * q, low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}
function summary(values) {
  if (!values.length) return { n: 0, mean: NaN, q1: NaN, median: NaN, q3: NaN };
  const sorted = new Float64Array(values).sort();
  let sum = 0;
  for (const v of sorted) sum += v;
  return { n: sorted.length, mean: sum / sorted.length, q1: quantile(sorted, 0.25), median: quantile(sorted, 0.5),
    q3: quantile(sorted, 0.75) };
}
const binOf = (i, n) => Math.floor(BINS * i / n);

// Mean weight in each of 20 equal parts of a rollout's sampled tokens; NaN if a part has no token.
const profile = (r, set) => cached(r, "profile" + set, () => {
  const w = credit(r, "w", set), sums = new Float64Array(BINS), counts = new Float64Array(BINS);
  for (let i = 0; i < w.length; i++) if (w[i] === w[i]) { sums[binOf(i, w.length)] += w[i]; counts[binOf(i, w.length)]++; }
  return sums.map((sum, b) => sum / counts[b]);
});
// Over rollouts with equal weight, or over the tokens of a single rollout.
function weightProfile(list, set) {
  const bins = Array.from({ length: BINS }, () => []);
  if (list.length === 1) {
    const w = credit(list[0], "w", set);
    w.forEach((v, i) => { if (v === v) bins[binOf(i, w.length)].push(v); });
  } else {
    for (const r of list) profile(r, set).forEach((v, b) => { if (v === v) bins[b].push(v); });
  }
  return bins.map(summary);
}

// Square roots show both the many values near zero and the few large ones.
const root = (v) => Math.sign(v) * Math.sqrt(Math.abs(v));
const ranges = data.sets.map(() => null);
function range(set) {
  if (ranges[set]) return ranges[set];
  let high = 0.01, low = 0, top = 0.01;
  for (const r of rollouts) if (r.traced && r.sampled.length) {
    const [a, b] = extent(credit(r, "d", set)), h = extent(evidence(r, "h"))[1];
    low = Math.min(low, a); high = Math.max(high, b); top = Math.max(top, h);
  }
  return (ranges[set] = { low: root(low), high: root(high), top: root(top) });
}
function cells(r, set) {
  const d = credit(r, "d", set), h = evidence(r, "h"), { low, high, top } = range(set);
  const out = new Int16Array(d.length).fill(-1);
  for (let i = 0; i < d.length; i++) {
    const x = Math.min(GRID - 1, Math.floor(GRID * root(h[i]) / top));
    const y = Math.min(GRID - 1, Math.floor(GRID * (root(d[i]) - low) / (high - low)));
    if (x >= 0 && y >= 0) out[i] = GRID * y + x;
  }
  return out;
}
// Number of anchors among the fifth of the sampled tokens with the highest entropy; earlier tokens first among equal ones.
const topAnchors = (r, set) => cached(r, "top" + set, () => {
  const h = evidence(r, "h"), most = Math.ceil(0.2 * h.length), own = new Set(anchors(r, set).map((t) => places(r)[t]));
  const least = cached(r, "least", () => Float32Array.from(h, (v) => (v === v ? v : -Infinity)).sort()[h.length - most]);
  let room = most, top = 0;  // number of tokens with exactly that entropy that still fit
  for (const v of h) if (v > least) room--;
  for (let i = 0; i < h.length; i++) if (h[i] > least || (h[i] === least && room-- > 0)) top += own.has(i) ? 1 : 0;
  return top;
});
// The non-empty cells of a rollout: a flat list of (cell, tokens, anchors).
const crowd = (r, set) => cached(r, "crowd" + set, () => {
  const cell = cells(r, set), own = new Set(anchors(r, set).map((t) => places(r)[t])), sums = new Map();
  for (let i = 0; i < cell.length; i++) if (cell[i] >= 0) {
    const sum = sums.get(cell[i]) ?? [0, 0];
    sum[0]++;
    if (own.has(i)) sum[1]++;
    sums.set(cell[i], sum);
  }
  return Uint32Array.from([...sums].flatMap(([c, sum]) => [c, ...sum]));
});
function summarise(r, set) {
  profile(r, set);
  if (!r.sampled.length) return;
  topAnchors(r, set);
  crowd(r, set);
  lands(r, set);
}
function entropyMap(list, set) {
  const all = new Uint32Array(GRID * GRID), marked = new Uint32Array(GRID * GRID);
  let found = 0, top = 0, tokens = 0, measured = false;
  for (const r of list) {
    const sums = crowd(r, set);
    for (let i = 0; i < sums.length; i += 3) {
      all[sums[i]] += sums[i + 1];
      marked[sums[i]] += sums[i + 2];
      tokens += sums[i + 1];
    }
    found += anchors(r, set).length;
    top += topAnchors(r, set);
    measured ||= r.credits[set].d !== 0;
  }
  return { all, marked, anchors: found, top, share: top / found, tokens, measured };
}

// ---- decisions that the environment judged ----------------------------------------------------------------------------
const firstWrong = (r) => (r.traced ? r.decisions.find(([mark]) => mark < 0) ?? null : null);
const lands = (r, set) => cached(r, "lands" + set, () => {
  const wrong = firstWrong(r);
  if (!wrong) return null;
  const place = places(r), a = credit(r, "a", set);
  let on = 0, sum = 0, near = 0;
  a.forEach((v, i) => {
    const size = Math.abs(v), t = r.sampled[i];
    if (size === size) { sum += size; if (t >= wrong[1] && t < wrong[2]) on += size; }
    if (t >= wrong[1] && t < wrong[2]) near++;
  });
  return { offsets: anchors(r, set).map((t) => place[t] - place[wrong[1]]), mass: on / sum, tokens: near / a.length };
});
const offsetBar = (offset) => OFFSETS.filter((least) => offset >= least).length;
function decisionMap(list, set) {
  const bars = new Uint32Array(OFFSET_NAMES.length);
  let judged = 0, wrong = 0, found = 0, mass = 0, tokens = 0, heavy = 0;
  for (const r of list) {
    if (!r.decisions.length) continue;
    judged++;
    const here = lands(r, set);
    if (!here) continue;
    wrong++;
    for (const offset of here.offsets) { bars[offsetBar(offset)]++; found++; }
    if (here.mass === here.mass) { mass += here.mass; tokens += here.tokens; heavy++; }
  }
  return { bars, judged, wrong, anchors: found, mass: mass / heavy, tokens: tokens / heavy, heavy };
}
