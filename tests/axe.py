"""axe-core in a browser's tab: what of an open page is hard to use without sight or a mouse.

`npm ci --prefix samples` installs it, in the version of samples/package-lock.json.
"""

from __future__ import annotations

from pathlib import Path

from tests.report.browser import Browser

SCRIPT = Path(__file__).parent.parent / "samples" / "node_modules" / "axe-core" / "axe.min.js"
RUN = """axe.run().then(found => [...found.violations,
...found.incomplete.filter(rule => rule.id !== 'color-contrast')].flatMap(
rule => rule.nodes.map(node => [rule.id, rule.help, node.target.join(' '),
node.any.concat(node.all, node.none).map(check => check.message).join('; ')].join(' | '))))"""


def findings(tab: Browser) -> list[str]:
    """Return a line for each finding on the open page: its rule, the element, and the reason.

    What axe-core cannot decide is a finding too, but for the contrast over a gradient or in a
    drawing: the test that measures every text (CONTRAST) decides that.
    """
    tab.value(f"{SCRIPT.read_text(encoding='utf-8')}\n;0")
    lines: list[str] = tab.value(RUN)
    return lines
