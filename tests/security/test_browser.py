"""The credit page of rollouts with malicious text, in a real browser."""

from pathlib import Path

import pytest
from credit_pages import fake_rollout, fake_tensors
from headless_browser import dump

from gear_lightning.lens.page import render_credit_page
from gear_lightning.runs.records import Record

PWN = "document.documentElement.setAttribute('data-pwned', 'yes')"
ATTACKS = [
    f"</script><script>{PWN}</script>",
    f"<!--<script>{PWN}//",
    f'<img src=x onerror="{PWN}">',
    f'<svg onload="{PWN}"></svg>',
    f'<iframe srcdoc="<script>parent.{PWN}</script>"></iframe>',
    f'<a href="javascript:{PWN}" autofocus onfocus="{PWN}">x</a>',
    f'" onmouseover="{PWN}" autofocus onfocus="{PWN}" x="',
    f"';{PWN};'",
    f"\u2028{PWN}\u2029",
    "<style>*{display:none}</style><base href=//evil.example><meta http-equiv=refresh content=0;url=//evil.example>",
    "@DATA@@TITLE@@SCRIPT@",
]


def browse(page: str, folder: Path) -> str:
    """Return the document after its scripts have run."""
    file = folder / "page.html"
    file.write_text(page)
    return dump(file, folder / "profile")


def attacked() -> str:
    """A page in which every text is malicious: tokens, ids, errors, roles, messages, tool names, the title."""
    call = [{"function": {"name": attack, "arguments": {attack: attack}}} for attack in ATTACKS]
    messages = [{"role": a, "content": a, "tool_calls": call, a: a} for a in ATTACKS]
    text = {name: " ".join(ATTACKS) for name in ("task_id", "status", "error")}
    shown = [fake_rollout(**text, messages=messages, reward_parts=dict.fromkeys(ATTACKS, 1.0), row=row)
             for row in (0, None)]  # fmt: skip
    tensors = fake_tensors()
    return render_credit_page([Record(0, 0, shown, tensors)], lambda t: ATTACKS[t % len(ATTACKS)], title=ATTACKS[0])


@pytest.mark.parametrize("traced", [True, False])
def test_scripts_in_rollouts_do_not_run_and_their_text_is_shown(tmp_path, traced):
    page = attacked()
    if not traced:
        record = Record(0, 0, [fake_rollout(row=None, messages=[{"role": a, "content": a} for a in ATTACKS])], {})
        page = render_credit_page([record], str, title=ATTACKS[0])
    dom = browse(page, tmp_path)
    assert 'data-pwned="yes"' not in dom
    body = dom.partition("<body")[2].replace(page.partition('id="data">')[2].partition("</script>")[0], "")
    assert "<img" not in body
    assert "<iframe" not in body
    assert "javascript:" not in "".join(part.partition(">")[0] for part in body.split("<a ")[1:])
    assert "2 rollouts" in body if traced else "1 rollout" in body  # the page's own script has run
    assert "&lt;img src=x onerror=" in body


def test_the_content_security_policy_blocks_injected_markup(tmp_path):
    """Markup injected into the page does not run either; without the policy it does."""
    page = render_credit_page([Record(0, 0, [fake_rollout()], fake_tensors())], lambda token: f" {token}")
    forced = page.replace("<body>", f'<body><script>{PWN}</script><img src=x onerror="{PWN}">')
    assert 'data-pwned="yes"' not in browse(forced, tmp_path)
    without = forced.replace("Content-Security-Policy", "X")
    assert 'data-pwned="yes"' in browse(without, tmp_path)
