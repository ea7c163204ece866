"""The credit page in a real browser: its filters, charts and comparison of rules."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from credit_pages import ATTACK, fake_rollout, fake_tensors
from credit_pages import decode as decode_words
from headless_browser import Page
from lens_records import decode, other_credit, record

from gear_lightning.lens.page import render_credit_page
from gear_lightning.runs.records import Record

RECORDS = [record(iteration) for iteration in range(3)]  # 8 rollouts each, of which the last has no row
OTHERS = [other_credit(one) for one in RECORDS]
OTHER = "Turn <b>(0.5)</b>"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a page with 24 rollouts and two sets of credit."""
    file = tmp_path_factory.mktemp("page") / "two.html"
    file.write_text(render_credit_page(RECORDS, decode, title="Lens", others={OTHER: OTHERS}))
    return file.as_uri()


@pytest.fixture
def lens(browser: Page, two: str) -> Iterator[Page]:
    """Open that page; its console must contain no errors."""
    browser.errors.clear()
    browser.size(1500)
    browser.open(two)
    yield browser
    assert browser.errors == []


def places() -> list[tuple[Record, int]]:
    """Return all rollouts in the page's order."""
    return [(one, row) for one in reversed(RECORDS) for row in range(len(one.rollouts))]


def key(one: Record, row: int) -> str:
    return f"i{one.iteration}.r0.{row}"


def found(lens: Page) -> list[str]:
    return lens.js("found.map((r) => r.key)")


def said(one: Record, row: int) -> str:
    if one.rollouts[row]["row"] is None:
        return ""
    tokens = one.tensors["tokens"][row][one.tensors["valid"][row]].tolist()
    return "".join(decode(token) for token in tokens).lower().replace("\n", " ")


def sampled(one: Record, row: int, name: str) -> np.ndarray:
    values = one.tensors[name] if name in one.tensors else getattr(OTHERS[one.iteration], name)
    return values[row][one.tensors["action_mask"][row]].double().numpy()


# -- filters ----------------------------------------------------------------------------------------------------------

CHOICES = {
    ("result", "solved"): lambda r, said: r["success"],
    ("result", "failed"): lambda r, said: not r["success"] and r["reward"] is not None,
    ("result", "unscored"): lambda r, said: r["reward"] is None,
    ("iteration", "1"): lambda r, said: r["iteration"] == 1,
    ("status", "truncated"): lambda r, said: r["status"] == "truncated",
    ("turn", "5"): lambda r, said: r["row"] is not None and r["turns"] == 6,
    ("credit", "none"): lambda r, said: r["row"] is None,
    ("low", "0.3"): lambda r, said: r["reward"] is not None and r["reward"] >= 0.3,
    ("high", "0.3"): lambda r, said: r["reward"] is not None and r["reward"] <= 0.3,
    ("task", "task/1"): lambda r, said: r["task_id"] == "task/1",
    ("task", "SK/0"): lambda r, said: r["task_id"] == "task/0",
    ("q", "STUCK"): lambda r, said: r["error"] is not None,
    ("q", "Key44 QUIT171"): lambda r, said: "key44" in said and "quit171" in said,
    ("q", '"iteration 2" done'): lambda r, said: r["iteration"] == 2 and r["status"] == "done",
}


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_each_filter_selects_the_matching_rollouts(lens, choice):
    name, value = choice
    wanted = [key(*p) for p in places() if CHOICES[choice](p[0].rollouts[p[1]], said(*p))]
    assert 0 < len(wanted) < 24
    (lens.type if name in ("q", "task", "low", "high") else lens.choose)(f"#f-{name}", value)
    assert found(lens) == wanted
    assert lens.text("#count") == f"{len(wanted)} of 24 rollouts"
    assert lens.js("current.key") in wanted
    lens.click("#clear")
    assert lens.text("#count") == "24 of 24 rollouts"


def test_a_phrase_must_match_exactly(lens):
    words = said(*places()[0]).split()[3:5]
    assert f"{words[1]} {words[0]}" not in said(*places()[0])
    for phrase, there in ((f"{words[0]} {words[1]}", True), (f"{words[1]} {words[0]}", False)):
        lens.type("#f-q", f'"{phrase}"')
        assert (key(*places()[0]) in found(lens)) is there
        assert found(lens) == [key(*p) for p in places() if phrase in said(*p)]
    lens.type("#f-q", "no such word")
    assert lens.text("#count") == "0 of 24 rollouts"
    assert lens.text("#list") == "No rollout matches."


def test_filters_combine_and_a_turn_is_emphasized(lens):
    lens.choose("#f-result", "solved")
    lens.choose("#f-turn", "1")
    wanted = [key(*p) for p in places() if p[0].rollouts[p[1]]["success"]]
    assert found(lens) == wanted
    turns = lens.js("[...document.querySelectorAll('#tokens .turn')].map((e) => e.classList.contains('dim'))")
    assert turns == [n != 1 for n in range(len(turns))]
    lens.choose("#f-turn", "")
    assert lens.js("document.querySelectorAll('#tokens .dim').length") == 0


# -- selection --------------------------------------------------------------------------------------------------------


def test_next_and_previous_by_button_key_and_list(lens):
    order = [key(*p) for p in places()]
    lens.click(".row", 2)
    assert lens.js("current.key") == order[2]
    for act, at in (
        (lambda: lens.click("#next"), 3),
        (lambda: lens.key("j"), 4),
        (lambda: lens.key("n"), 5),
        (lambda: lens.key("k"), 4),
        (lambda: lens.click("#prev"), 3),
    ):
        act()
        assert lens.js("current.key") == order[at]
    lens.js("document.querySelector('#list').focus()")
    for press, at in (("ArrowDown", 4), ("ArrowUp", 3), ("End", 23), ("Home", 0)):
        lens.key(press)
        assert lens.js("current.key") == order[at]
        active = "document.getElementById(document.querySelector('#list').getAttribute('aria-activedescendant'))"
        assert lens.js(f"{active}.getAttribute('aria-selected')") == "true"
    lens.choose("#f-iteration", "0")
    lens.key("End")
    assert lens.js("current.key") == "i0.r0.7"
    lens.click("#next")  # the last one: no effect
    assert lens.js("current.key") == "i0.r0.7"
    assert lens.text("#error").startswith("Error: ValueError: the door is stuck")
    assert "task: look please" in lens.text("#tokens")


def test_keys_in_a_text_field_are_not_shortcuts(lens):
    before = lens.js("current.key")
    lens.key("/")
    for letter in "jkc":
        lens.key(letter)
    assert lens.js("document.querySelector('#f-q').value") == "jkc"
    assert lens.js("state.tab") == "tokens"
    lens.type("#f-q", "")
    assert lens.js("current.key") == before


def test_keys_move_between_tokens_and_anchors(lens):
    one, row = RECORDS[2], 0
    lens.js("location.hash = '#r=i2.r0.0'")
    lens.wait("current.key === 'i2.r0.0'")
    both = {*one.tensors["anchor"][row].tolist(), *OTHERS[2].anchor[row].tolist()} - {-1}
    lens.click("#tokens .tok")
    for t in sorted(both)[:3]:
        lens.key("a")
        assert lens.js("selected") == t
        assert "this" in lens.texts("#inspector tr:nth-child(5) td")  # the anchor of one of the sets
    lens.key("ArrowRight")
    assert lens.js("[selected, document.activeElement.token]") == [t + 1, t + 1]
    lens.key("ArrowDown")
    assert lens.js("selected") > t + 1


def test_the_address_restores_selection_filters_and_view(lens, two):
    lens.choose("#f-result", "failed")
    lens.type("#f-q", "look")
    lens.choose("#s-view", "difference")
    lens.click("#tab-charts")
    lens.click("#next")
    lens.choose("#f-turn", "2")
    shown = lens.js("[current.key, found.map((r) => r.key), state.view, state.tab, location.hash]")
    assert lens.js("document.querySelector('#link').href") == f"{two}{shown[4]}"
    lens.open(f"{two}{shown[4]}")
    assert lens.js("[current.key, found.map((r) => r.key), state.view, state.tab, location.hash]") == shown
    assert lens.js("document.querySelector('#f-q').value") == "look"
    lens.open(f"{two}#i1.r0.3")  # format of earlier versions
    assert lens.js("current.key") == "i1.r0.3"
    for odd in ("#r=nothing&turn=77&left=9&view=x&tab=y", "#%%%&=&&", "#r=i1.r0.3&result=nonsense"):
        lens.open(f"{two}{odd}")
        assert lens.text("#count") == "24 of 24 rollouts"


def test_back_and_forward(lens):
    lens.click(".row", 1)
    lens.click(".row", 4)
    lens.choose("#f-iteration", "1")
    for back, rollout, count in ((-1, "i2.r0.4", 24), (-1, "i2.r0.1", 24), (1, "i2.r0.4", 24), (1, "i1.r0.0", 8)):
        lens.js(f"history.go({back})")
        lens.wait(f"current.key === '{rollout}' && found.length === {count}")
    lens.js("location.hash = '#r=i0.r0.2'")
    lens.wait("current.key === 'i0.r0.2' && found.length === 24")


# -- two sets of credit -----------------------------------------------------------------------------------------------


def test_two_sets_side_by_side(lens):
    one, row = RECORDS[2], 1
    lens.js("location.hash = '#r=i2.r0.1'")
    lens.wait("current.key === 'i2.r0.1'")
    assert lens.texts("#s-left option") == lens.texts("#s-right option") == ["recorded", OTHER]
    lanes = lens.js(
        "[...document.querySelectorAll('#tokens .pair')].map((pair) => [...pair.children].map((lane) => "
        "[...lane.querySelectorAll('.tok')].map((e) => [e.token, e.classList.contains('hi'), "
        "e.classList.contains('lo'), e.classList.contains('anchor')])))"
    )
    where = one.tensors["action_mask"][row].nonzero().flatten().tolist()
    credits = ((one.tensors["weights"], one.tensors["anchor"]), (OTHERS[2].weights, OTHERS[2].anchor))
    for side, (weights, anchor) in enumerate(credits):
        wanted = [
            [t, bool(weights[row, t] > 1.005), bool(weights[row, t] < 0.995), int(anchor[row, t]) == t] for t in where
        ]
        assert [token for pair in lanes for token in pair[side]] == wanted
    left, right = (
        lens.js(f"document.querySelectorAll('#tokens .pair .lane')[{n}].getBoundingClientRect().x") for n in (0, 1)
    )
    assert right > left + 100
    lens.size(700)  # too narrow for two columns
    sides = lens.js("[...document.querySelectorAll('#tokens .pair .lane')].map((e) => e.getBoundingClientRect().x)")
    assert len(set(sides)) == 1
    assert lens.js("document.documentElement.scrollWidth") <= 700
    lens.choose("#s-view", "right")
    assert lens.js("document.querySelectorAll('#tokens .pair').length") == 0
    assert len(lens.texts("#tokens .turn .tok")) == len(where)


def test_the_difference_is_right_minus_left(lens):
    one, row = RECORDS[2], 1
    lens.js("location.hash = '#r=i2.r0.1'")
    lens.wait("current.key === 'i2.r0.1'")
    lens.choose("#s-view", "difference")
    more = OTHERS[2].weights[row] - one.tensors["weights"][row]
    where = one.tensors["action_mask"][row].nonzero().flatten().tolist()
    shown = lens.js(
        "[...document.querySelectorAll('#tokens .turn .tok')].map((e) => "
        "[e.token, e.classList.contains('hi'), e.classList.contains('lo')])"
    )
    assert shown == [[t, bool(more[t] > 0.005), bool(more[t] < -0.005)] for t in where]
    t = int(more.abs().argmax())
    lens.js(f"select({t})")
    cells = lens.texts("#inspector tr:nth-child(2) td")
    values = [float(one.tensors["weights"][row, t]), float(OTHERS[2].weights[row, t]), float(more[t])]
    assert [float(cell.replace("−", "-")) for cell in cells] == pytest.approx(values, abs=2e-3)
    flags = lens.texts("#tokens .turn .tok.anchor .flag")
    assert flags.count("L") == len(set(one.tensors["anchor"][row].tolist()) - {-1})
    assert flags.count("R") == len(set(OTHERS[2].anchor[row].tolist()) - {-1})
    lens.choose("#s-left", "1")  # the same on both sides: no difference is shown
    assert lens.texts("#tokens .turn .flag")[0] not in ("L", "R")


def test_two_sets_are_named_and_their_difference_is_explained(lens):
    lens.js("location.hash = '#r=i2.r0.1'")
    lens.wait("current.key === 'i2.r0.1'")
    assert lens.texts("#inspector th")[:3] == ["L", "R", "R − L"]
    assert lens.js("[...document.querySelectorAll('#inspector th')].every((e) => e.scrollWidth <= e.clientWidth)")
    assert lens.text("#inspector .sides") == f"L recordedR {OTHER}R − L right minus left"
    assert "Segments, recorded" in lens.texts("#facts dt")
    # the name of a set is separate from the turn's
    box = "document.querySelector('{}').getBoundingClientRect()"
    assert lens.js(f"{box.format('.set')}.top - {box.format('.turn h3')}.bottom") >= 5


def test_equal_divergences_are_shown_as_equal(lens, tmp_path):
    same = [replace(other, divergence=one.tensors["divergence"]) for one, other in zip(RECORDS, OTHERS, strict=True)]
    name = "GEAR(divergence='reverse_kl', sign_rule='symmetric', kappa=2.0)"
    (tmp_path / "page.html").write_text(render_credit_page(RECORDS, decode, others={name: same}))
    for width in (1500, 420):
        lens.size(width)
        lens.open((tmp_path / "page.html").as_uri())
        assert lens.text("#chart .aside").endswith("(equal)")
        assert lens.js(
            "document.querySelector('#chart .aside').parentNode.getBBox().width + 40 <= $('chart').clientWidth"
        )
        under, over = lens.js(
            "['under', 'second'].map((c) => { "
            "const s = getComputedStyle(document.querySelector(`#chart .curve.${c}`)); "
            "return [parseFloat(s.strokeWidth), s.strokeDasharray]; })"
        )
        assert under[0] > 2 * over[0]
        assert (under[1], over[1]) == ("none", "4px, 3px")


def test_the_panel_is_folded_on_a_narrow_screen(lens):
    height = "$('right').getBoundingClientRect().height"
    assert lens.js("getComputedStyle($('fold')).display") == "none"
    lens.size(420, 900)
    lens.wait(f"{height} < 60")
    assert lens.text("#inspector .brief").startswith("weight L ")
    assert lens.js("document.documentElement.scrollWidth") <= 420
    lens.click("#fold")
    assert lens.js("[$('fold').textContent, $('fold').getAttribute('aria-expanded')]") == ["Less", "true"]
    assert 150 < lens.js(height) <= 450
    lens.click("#fold")
    assert lens.js(height) < 60


def test_a_weight_of_nan_is_not_shown_as_a_weight_of_one(lens, tmp_path):
    one = RECORDS[2]
    t = int(one.tensors["action_mask"][0].nonzero()[3])
    weights = torch.where(one.tensors["action_mask"], 1.0, 1.0)
    weights[0, t] = torch.nan
    odd = replace(one, tensors={**one.tensors, "weights": weights})
    (tmp_path / "page.html").write_text(render_credit_page([odd], decode))
    lens.open((tmp_path / "page.html").as_uri() + "#r=i2.r0.0")
    assert lens.js("[...document.querySelectorAll('#tokens .nan')].map((e) => e.token)") == [t]
    assert lens.js("document.querySelectorAll('#chart .nan-bar').length") == 1
    assert "weight is not finite" in lens.text("#legend")
    assert "every sampled token has weight 1" not in lens.text("#legend")


def test_one_set_has_one_column_and_no_choice(lens, tmp_path):
    (tmp_path / "one.html").write_text(render_credit_page(RECORDS, decode))
    lens.open((tmp_path / "one.html").as_uri())
    assert lens.js("document.querySelector('#sets').hidden")
    assert lens.js("document.querySelectorAll('#tokens .pair, #tokens .set').length") == 0
    lens.key("c")
    assert lens.js("document.querySelectorAll('#charts-filter figure').length") == 3


# -- charts -----------------------------------------------------------------------------------------------------------


def table(lens: Page, scope: str, kind: str, number: int) -> list[list[str]]:
    """Open the table of numbers below a chart, and return its cells."""
    at = f"document.querySelectorAll('#charts-{scope} figure.{kind}')[{number}]"
    lens.js(f"(() => {{ {at}.querySelector('details').open = true; }})()")
    lens.wait(f"!!{at}.querySelector('table')")
    return lens.js(f"[...{at}.querySelectorAll('tr')].map((tr) => [...tr.children].map((td) => td.textContent))")


def floats(row: list[str]) -> list[float]:
    return [float(cell.replace("−", "-").replace("–", "nan")) for cell in row]


def parts(values: np.ndarray) -> list[np.ndarray]:
    """Return the values in 20 equal parts, by position."""
    at = np.arange(len(values)) * 20 // len(values)
    return [values[at == b] for b in range(20)]


FIVE = ("n", "mean", "q1", "median", "q3")


def five(values: np.ndarray) -> list[float]:
    if not len(values):
        return [0, *[float("nan")] * 4]
    return [len(values), values.mean(), *np.quantile(values, [0.25, 0.5, 0.75])]


@pytest.mark.parametrize("number", [0, 1])
def test_weight_over_the_rollout(lens, number):
    lens.choose("#f-iteration", "2")
    lens.click("#tab-charts")
    head, *rows = table(lens, "filter", "position", number)
    assert head[1:4] == ["solved n", "solved mean", "solved q1"]
    one = RECORDS[2]
    every = one.tensors["weights"] if number == 0 else OTHERS[2].weights
    groups = [
        [
            [part.mean() if len(part) else np.nan for part in parts(values.double().numpy())]
            for row in range(7)
            if one.rollouts[row]["success"] is won
            for values in [every[row][one.tensors["action_mask"][row]]]
        ]
        for won in (True, False)
    ]
    assert all(groups)
    for b, row in enumerate(rows):
        wanted = [x for group in groups for x in five(np.array([r[b] for r in group if not np.isnan(r[b])]))]
        assert floats(row) == pytest.approx([b + 1, *wanted], abs=2e-3, nan_ok=True)


def test_weight_over_one_rollout(lens):
    lens.js("location.hash = '#r=i1.r0.2&tab=charts'")
    lens.wait("current.key === 'i1.r0.2' && state.tab === 'charts'")
    _, *rows = table(lens, "one", "position", 0)
    for b, (row, part) in enumerate(zip(rows, parts(sampled(RECORDS[1], 2, "weights")), strict=True)):
        assert floats(row) == pytest.approx([b + 1, *five(part)], abs=2e-3, nan_ok=True)


@pytest.mark.parametrize("number", [0, 1])
def test_anchors_against_entropy(lens, number):
    lens.click("#tab-charts")
    numbers = {name: float(value) for name, value in table(lens, "filter", "entropy", number)[1:]}
    tokens = anchors = top = 0
    for one in RECORDS:
        for row in range(7):
            mask, entropy = one.tensors["action_mask"][row], sampled(one, row, "entropy")
            anchor = (one.tensors["anchor"] if number == 0 else OTHERS[one.iteration].anchor)[row][mask]
            where = mask.nonzero().flatten()
            mine = {int((where == a).nonzero()) for a in set(anchor.tolist()) - {-1}}
            first = np.argsort(-np.round(entropy * 1000), kind="stable")[: int(np.ceil(0.2 * len(entropy)))]
            tokens, anchors, top = tokens + len(entropy), anchors + len(mine), top + len(mine & set(first.tolist()))
    assert anchors > 20
    assert numbers == pytest.approx(
        {"sampled tokens": tokens, "anchors": anchors, "in the top fifth": top, "share": top / anchors}, abs=1e-4
    )
    assert lens.js("document.querySelectorAll('#charts-filter figure.entropy .ring').length") > 10
    assert f"{round(100 * top / anchors)} %" in lens.texts("#charts-filter figure.entropy strong")[number]


LEAST = [-50, -20, -10, -5, -2, -1, 0, 1, 2, 3, 6, 11, 21, 51]


@pytest.mark.parametrize("number", [0, 1])
def test_anchors_from_the_first_wrong_decision(lens, number):
    lens.click("#tab-charts")
    _, *rows = table(lens, "filter", "decisions", number)
    offsets, mass, share, judged = [], [], [], 0
    for one in RECORDS:
        for row in range(7):
            mask = one.tensors["action_mask"][row]
            mark = one.tensors["decisions"][row][mask]
            judged += bool(mark.any())
            if not (mark < 0).any():
                continue
            start = int((mark < 0).nonzero()[0])
            on = torch.zeros(len(mark), dtype=torch.bool)
            on[start : start + 4] = True  # a decision has four tokens
            credit = one.tensors if number == 0 else vars(OTHERS[one.iteration])
            size = credit["token_advantages"][row][mask].abs()
            mass.append(float(size[on].sum() / size.sum()))
            share.append(float(on.float().mean()))
            where = mask.nonzero().flatten()
            for a in set(credit["anchor"][row][mask].tolist()) - {-1}:
                offsets.append(int((where == a).nonzero()) - start)
    edges = [-np.inf, *LEAST, np.inf]
    bars = [sum(low <= x < high for x in offsets) for low, high in pairwise(edges)]
    assert len(mass) > 5
    wanted = [judged, len(mass), len(offsets), np.mean(mass), np.mean(share), *bars]
    assert floats([row[1] for row in rows]) == pytest.approx(wanted, abs=1e-3)
    heights = lens.js(
        f"[...document.querySelectorAll('#charts-filter figure.decisions')[{number}].querySelectorAll('.bar')]"
        ".map((e) => Number(e.getAttribute('height')))"
    )
    assert [h / max(heights) for h in heights] == pytest.approx([b / max(bars) for b in bars])


def test_decisions_are_marked_in_the_text_and_their_chart_needs_some(lens, tmp_path):
    one, row = RECORDS[2], next(row for row in range(7) if not RECORDS[2].rollouts[row]["success"])
    lens.js(f"location.hash = '#r=i2.r0.{row}&view=left'")
    lens.wait(f"current.key === 'i2.r0.{row}'")
    for name, mark in (("wrong", -1), ("right", 1)):
        shown = lens.js(f"[...document.querySelectorAll('#tokens .tok.{name}')].map((e) => e.token)")
        assert shown == (one.tensors["decisions"][row] == mark).nonzero().flatten().tolist()
        assert len(shown) > 3
    assert lens.texts("#tokens .wrong .verdict") == ["✗"]
    unknown = record(0, judged=False)
    (tmp_path / "page.html").write_text(render_credit_page([unknown], decode))
    lens.open((tmp_path / "page.html").as_uri())
    lens.key("c")
    assert lens.js("document.querySelectorAll('figure').length") == 4
    assert lens.js("document.querySelectorAll('figure.decisions').length") == 0


def test_charts_follow_the_filter(lens):
    lens.key("c")
    assert lens.text("#charts-filter h3") == "Filter: 24 rollouts"
    lens.choose("#f-result", "solved")
    solved = sum(r["success"] for one in RECORDS for r in one.rollouts)
    assert lens.text("#charts-filter h3") == f"Filter: {solved} rollouts"
    assert table(lens, "filter", "position", 0)[0] == ["part", *(f"solved {name}" for name in FIVE)]
    lens.type("#f-q", "no such word")
    assert lens.text("#charts-filter .figures") == "No rollout has credit."


# -- appearance, speed, safety ----------------------------------------------------------------------------------------


def contrast(lens: Page, selector: str, other: str) -> float:
    """Return the WCAG contrast of an element's color and another's background, as computed by the browser."""
    one, two = lens.js(
        "(() => { const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true}); "
        "const rgb = (color) => { c.fillStyle = color; c.fillRect(0, 0, 1, 1); "
        "return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); }; "
        f"const style = (s) => getComputedStyle(document.querySelector(s)); return [rgb(style('{selector}').color), "
        f"rgb(style('{other}').backgroundColor)]; }})()"
    )
    linear = [
        [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(c) / 255] for c in (one, two)
    ]
    low, high = sorted(float(np.dot([0.2126, 0.7152, 0.0722], c)) for c in linear)
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark_themes_by_system_setting_and_by_button(lens, two):
    light = {}
    for scheme in ("light", "dark"):
        lens.scheme(scheme)
        lens.open(two)
        light[scheme] = lens.js("getComputedStyle(document.body).backgroundColor")
        lens.js("location.hash = '#r=i2.r0.1'")
        lens.wait("current.key === 'i2.r0.1'")
        for selector in ("#name", ".muted", "#tokens .turn .tok", "#tokens .context .tok", ".solved", ".failed"):
            assert contrast(lens, selector, "#tokens") > 4.5, (scheme, selector)
    assert light["light"] != light["dark"]
    lens.scheme("light")
    backgrounds = []
    for name in ("light", "dark", "auto"):
        lens.click("#theme")
        assert lens.text("#theme") == f"Theme: {name}"
        backgrounds.append(lens.js("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == [light["light"], light["dark"], light["light"]]


def test_a_thousand_rollouts_are_fast(browser, tmp_path):
    """Of about 500 tokens. Durations are compared with a loop in the same browser, which takes 0.1 s on an idle
    machine; the limits are several times the durations on such a machine."""
    browser.errors.clear()
    browser.size(1500)
    made = [record(i, rollouts=100, tokens=660, group=8, vocabulary=5000) for i in range(2)]
    many = [replace(made[i % 2], iteration=i) for i in range(10)]
    page = render_credit_page(many, decode, others={"other": 5 * [other_credit(one) for one in made]})
    assert sum(int(one.tensors["valid"].sum()) for one in many) > 480_000
    assert len(page) < 25_000_000
    file = tmp_path / "page.html"
    file.write_text(page)
    browser.open(file.as_uri())
    assert browser.js("rollouts.length") == 1000
    assert browser.js("document.querySelectorAll('.row').length") < 40
    browser.wait("document.documentElement.dataset.ready === 'all'")
    frame = "await new Promise((f) => requestAnimationFrame(() => setTimeout(f)))"

    def took(act: str) -> float:
        """Return the milliseconds that an action takes."""
        return browser.js(
            f"(async () => {{ const start = performance.now(); {act}; {frame}; return performance.now() - start; }})()"
        )

    unit = min(took("let x = 1; for (let i = 0; i < 1e8; i++) x = (x * 31 + i) | 0") for _ in range(3))
    typing = "$('f-q').value = '{}'; $('f-q').dispatchEvent(new Event('input', {{bubbles: true}}))"
    for tab in ("tokens", "charts"):
        browser.js(f"tab('{tab}')")
        took(typing.format("warm"))
        assert min(took(typing.format(text)) for text in ("d", "do", "door", "")) < 5 * unit
        assert min(took(f"show(rollouts[{n}]); remember(true)") for n in (3, 500, 700)) < 8 * unit
    browser.js("$('list').focus()")
    for _ in range(5):
        browser.key("ArrowDown")
    assert browser.js("rollouts.indexOf(current)") == 705
    assert browser.errors == []


def test_model_output_is_shown_as_text(browser, tmp_path):
    browser.errors.clear()
    rollouts = [
        fake_rollout(task_id=ATTACK, error=ATTACK, status=ATTACK, reward_parts={ATTACK: 1.0}),
        fake_rollout(row=None, messages=[{"role": ATTACK, "content": ATTACK}]),
    ]
    tensors = fake_tensors()
    tensors["tokens"] = tensors["tokens"].masked_fill(torch.arange(13)[None] == 9, 99)
    one = Record(0, 0, rollouts, tensors)
    page = render_credit_page([one], decode_words, title=ATTACK, others={ATTACK: [other_of(one)]})
    (tmp_path / "page.html").write_text(page)
    browser.open((tmp_path / "page.html").as_uri())
    browser.type("#f-q", ATTACK)
    browser.choose("#f-status", ATTACK)
    browser.type("#f-task", ATTACK)
    browser.choose("#s-view", "difference")
    for act in ("tab('charts')", "tab('tokens')", "$('clear').click()", "step(1)", "step(-1)"):
        browser.js(act)
        assert browser.js("document.querySelectorAll('img').length") == 0
        assert browser.js("document.title") == ATTACK
    assert ATTACK in browser.text("#tokens")
    assert browser.js("document.scripts.length") == 2
    assert browser.errors == []


def other_of(one: Record):
    tensors = one.tensors
    credit = other_credit(Record(0, 0, [], {**tensors, "divergence": tensors["divergence"] * 10}))
    assert (credit.anchor >= 0).any()
    return credit
