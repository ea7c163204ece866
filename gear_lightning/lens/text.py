"""One recorded rollout as text for a terminal; its tokens are marked by their credit."""

import json
from io import StringIO

from rich.console import Console
from rich.text import Text

from ..runs.records import Record
from .trace import Decode, Trace, trace, visible

LIMIT = 0.25  # smaller distances from weight 1 are shown in a light style, and not at all in plain text


def render_credit_text(record: Record, index: int, decode: Decode, *, color: bool = True, width: int = 100) -> str:
    """Return one rollout as text for a terminal: summary, legend, and its tokens by section.

    Args:
        record: the record that contains it.
        index: its position in ``record.rollouts``.
        decode: returns the text of a token id.
        color: show weights as background colors (24 bit); if False, plain text with the weights written out.
        width: columns; plain text is not wrapped.
    """
    one = trace(record, index)
    out = StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=color,
        no_color=not color,
        color_system="truecolor" if color else None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not color,
    )
    console.print(_summary(record, one))
    if not one.tokens:
        for message in one.rollout["messages"]:
            _heading(console, str(message.get("role", "?")), color)
            content, calls = message.get("content") or "", message.get("tool_calls")
            reasoning = [f"reasoning: {message['reasoning']}"] if message.get("reasoning") else []
            for part in [*reasoning, content, *([calls] if calls else [])]:
                text = part if isinstance(part, str) else json.dumps(part, ensure_ascii=False, indent=1)
                console.print(Text("\n".join(visible(line) for line in text.split("\n"))))
        return out.getvalue()
    console.print(_legend(color))
    weights = iter(one.columns["weights"].tolist())
    for turn, start, end in one.sections:
        kind = f"turn {turn}" if turn >= 0 else "observation" if start else "prompt"
        _heading(console, f"{kind} · {end - start} tokens", color)
        pieces = [visible(decode(token)) for token in one.tokens[start:end]]
        if turn < 0:
            console.print(Text("".join(pieces).removesuffix("\n"), style="dim"))
        else:
            text = _turn(pieces, [next(weights) for _ in pieces], start, one, color)
            console.print(text[:-1] if text.plain.endswith("\n") else text)
    return out.getvalue()


def _heading(console: Console, name: str, color: bool) -> None:
    line = f"── {visible(name)} "
    console.print(Text(line + "─" * max(0, min(console.width, 100) - len(line)), style="bold dim" if color else ""))


def _summary(record: Record, one: Trace) -> Text:
    rollout = one.rollout
    reward = "unknown" if rollout["reward"] is None else f"{rollout['reward']:.3g}"
    facts = [
        f"reward {reward} ({'solved' if rollout.get('success') else 'not solved'})",
        f"status {visible(rollout['status'])}",
        f"policy version {rollout.get('policy_version')}",
    ]
    if one.tokens:
        share = one.covered / max(1, one.sampled)
        facts += [
            f"advantage {'not finite' if one.advantage is None else format(one.advantage, '+.3f')}",
            f"{len(one.anchors)} segments, {share:.0%} of {one.sampled} sampled tokens",
        ]
    place = f"iteration {record.iteration} · rank {record.rank} · rollout {rollout.get('rollout')}"
    lines = [f"{visible(str(rollout.get('task_id')))} · {place}", " · ".join(facts)]
    for name, label in (("error", "error"), ("side_error", "side error")):
        if rollout.get(name):
            lines.append(f"{label}: " + " ".join(visible(line) for line in str(rollout[name]).splitlines()))
    if not one.tokens:
        lines.append("excluded from training: no tokens and no credit, only the transcript")
    text = Text(lines[0], style="bold")
    return text.append("\n" + "\n".join(lines[1:]), style="not bold")


def _legend(color: bool) -> Text:
    if not color:
        return Text(
            "legend: token⟨1.8⟩ has weight 1.8, ▲[segment]⟨1.8⟩ starts at its anchor; other tokens have weights "
            f"within {LIMIT} of 1"
        )
    text = Text("weight ")
    for weight in (0.0, 0.4, 0.8, 1.0, 1.2, 1.6, 2.0):
        text.append(f" {weight:g} ", style=_style(weight)).append(" ")
    text.append("  ▲ anchor, ")
    return text.append("segment", style="underline").append(", ").append("prompt and observations", style="dim")


def _style(weight: float) -> str:
    """Return a style: blue below weight 1, orange above, none near it.

    A small distance from 1 colors the letters, in a tone that is visible on light and dark terminals; a larger one
    colors the background, with its own text color.
    """
    away = abs(weight - 1)
    if not away >= 0.05:  # also true of nan
        return ""
    if away < LIMIT:
        return "#c77418" if weight > 1 else "#4a8fd6"
    pale, full = ((244, 200, 150), (236, 126, 16)) if weight > 1 else ((176, 208, 242), (66, 138, 214))
    depth = (min(1.0, away) - LIMIT) / (1 - LIMIT)
    red, green, blue = (round(a + depth * (b - a)) for a, b in zip(pale, full, strict=True))
    return f"#101010 on #{red:02x}{green:02x}{blue:02x}"


def _turn(pieces: list[str], weights: list[float], start: int, one: Trace, color: bool) -> Text:
    """Return the tokens of one turn as text; ``start`` is the index of its first token in the rollout."""
    opens = {begin - start: (anchor - start, end - start) for anchor, begin, end in one.segments}
    text, close, anchor, n = Text(), 0, -1, 0
    while n < len(pieces):
        anchor, close = opens.get(n, (anchor, close))
        inside = n < close
        if n == anchor:
            text.append("▲", style=f"bold {_style(weights[n])}" if color else "")
        if color:
            text.append(pieces[n], style=f"{_style(weights[n])} {'underline' if inside else ''}".strip())
            n += 1
            continue
        # A segment with one weight is written once; if a rule gives it several, its tokens are written separately.
        end = close if inside and len({round(w, 2) for w in weights[n:close]}) == 1 else n + 1
        shown = "".join(pieces[n:end])
        if inside:
            text.append(f"[{shown}]⟨{weights[n]:.1f}⟩")
        elif not abs(weights[n] - 1) < LIMIT:
            line_end = "\n" if shown.endswith("\n") else ""
            text.append(f"{shown.removesuffix(line_end)}⟨{weights[n]:.1f}⟩{line_end}")
        else:
            text.append(shown)
        n = end
    return text
