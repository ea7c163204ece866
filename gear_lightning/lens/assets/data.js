// ---- data: columns are in thousandths and contain only the sampled tokens --------------------------------------------
const rollouts = data.rollouts;
const SEPARATOR = "\u0000";

// A letter and base64 of little-endian integers; the smallest one marks values that are not finite.
function unpack(packed) {
  const raw = atob(packed.slice(1)), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return packed[0] === "s" ? new Int16Array(bytes.buffer) : new Int32Array(bytes.buffer);
}
function floats(packed, length) {
  if (typeof packed === "number") return new Float32Array(length).fill(packed / 1000);
  const whole = unpack(packed), missing = packed[0] === "s" ? -32768 : -2147483648;
  const out = new Float32Array(whole.length);
  for (let i = 0; i < out.length; i++) out[i] = whole[i] === missing ? NaN : whole[i] / 1000;
  return out;
}
for (const r of rollouts) {
  r.key = `i${r.iteration}.r${r.rank}.${r.index}`;
  r.kind = r.success ? "solved" : r.reward === null ? "unscored" : "failed";
  r.traced = Boolean(r.ids);
  r.length = r.traced ? r.sections.at(-1)[2] : 0;
  r.sampled = [];  // tokens
  r.turns_seen = new Set();
  for (const [turn, start, end] of r.traced ? r.sections : []) if (turn >= 0) {
    r.turns_seen.add(turn);
    for (let t = start; t < end; t++) r.sampled.push(t);
  }
  r.name = String(r.task_id).toLowerCase();
  r.cache = new Map();
}
function cached(r, key, make) {
  if (!r.cache.has(key)) r.cache.set(key, make());
  return r.cache.get(key);
}
const ids = (r) => cached(r, "ids", () => unpack(r.ids));
// A column of the evidence (h entropy, e teacher's entropy, p t s log-probs); null if missing.
const evidence = (r, key) => cached(r, key, () => (r.columns[key] === undefined ? null
  : floats(r.columns[key], r.sampled.length)));
// A column of a set of credit (w weight, a token advantage, d divergence).
const credit = (r, key, set) => cached(r, key + set, () => floats(r.credits[set][key], r.sampled.length));
// token -> index among the sampled tokens, -1 elsewhere
const places = (r) => cached(r, "places", () => {
  const out = new Int32Array(r.length).fill(-1);
  r.sampled.forEach((t, i) => { out[t] = i; });
  return out;
});
const turnOf = (r) => cached(r, "turn", () => {
  const out = new Int32Array(r.length).fill(-1);
  for (const [turn, start, end] of r.sections) if (turn >= 0) out.fill(turn, start, end);
  return out;
});
// token -> anchor of its segment, -1 outside
const anchorOf = (r, set) => cached(r, "anchor" + set, () => {
  const out = new Int32Array(r.length).fill(-1);
  for (const [anchor, start, end] of r.credits[set].segments) out.fill(anchor, start, end);
  return out;
});
const anchors = (r, set) => (r.traced ? cached(r, "anchors" + set, () =>
  [...new Set(r.credits[set].segments.map((s) => s[0]))].filter((t) => t < r.length && places(r)[t] >= 0)
    .sort((a, b) => a - b)) : []);
const weights = (r, set) => cached(r, "weights" + set, () => extent(credit(r, "w", set)));
const spread = (r, set) => Math.max(0.001, ...weights(r, set).map((w) => Math.abs(w - 1)));
// token -> 1 right, -1 wrong, 0 not judged
const decided = (r) => cached(r, "decided", () => {
  const out = new Int8Array(r.length);
  for (const [mark, start, end] of r.decisions) out.fill(mark, start, end);
  return out;
});
const tokenText = (r, t) => data.vocabulary[ids(r)[t]][1];

// ---- search text: built while the browser is idle, or at the first search ---------------------------------------------
let lower = null;
const plain = (text) => text.toLowerCase().replaceAll("⏎", "").replace(/^·+$/, " ").replace(/\s+/g, " ");
function said(r) {
  lower ??= data.vocabulary.map(([, text]) => plain(text));
  let text = "";
  for (const id of ids(r)) {
    const piece = lower[id];
    text += piece[0] === " " && text.endsWith(" ") ? piece.slice(1) : piece;
  }
  return text;
}
function searchText(r) {
  return cached(r, "text", () => {
    const facts = `${r.task_id} iteration ${r.iteration} rank ${r.rank} rollout ${r.rollout} ${r.status}`;
    const error = String(r.error ?? "").replace(/\s+/g, " ");
    const text = r.traced ? said(r) : (r.messages ?? []).map((m) => JSON.stringify(m)).join(SEPARATOR).toLowerCase();
    return `${facts}${SEPARATOR}${error}${SEPARATOR}`.toLowerCase() + text;
  });
}
function readAhead(from = 0) {
  const idle = window.requestIdleCallback ?? ((f) => setTimeout(() => f({ timeRemaining: () => 8 }), 30));
  idle((deadline) => {
    let i = from;  // all texts first, then all summaries
    while (i < 2 * rollouts.length && (i === from || deadline.timeRemaining() > 2)) {
      const r = rollouts[i % rollouts.length];
      if (i++ < rollouts.length) searchText(r);
      else if (r.traced) for (let set = 0; set < data.sets.length; set++) summarise(r, set);
    }
    if (i < 2 * rollouts.length) readAhead(i);
    else document.documentElement.dataset.ready = "all";
  });
}
