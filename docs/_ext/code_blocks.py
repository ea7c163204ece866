"""Check the code blocks of pages: Python compiles, YAML and JSON parse, commands exist. Warnings fail `make docs`."""

import json
import shlex

import yaml
from docutils import nodes
from sphinx.util import logging

from gear_lightning.__main__ import COMMANDS, LIGHTNING

LOG = logging.getLogger(__name__)


def problem(language: str, text: str) -> str | None:
    """Return what is wrong with a block of code; None if nothing is, or if its language is not checked."""
    try:
        if language == "python":
            compile(text, "block", "exec")
        elif language == "yaml":
            list(yaml.safe_load_all(text))
        elif language == "json":
            for line in text.splitlines():  # lines of a task file
                json.loads(line)
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["gear-lightning"] and words[1:] and words[1] not in KNOWN:
                    return f"no command {words[1]!r}"
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        return str(error)
    return None


KNOWN = {*LIGHTNING, *COMMANDS, "--help", "--version"}


def check(app, doctree):
    """Report invalid code blocks of a page."""
    for block in doctree.findall(nodes.literal_block):
        if (wrong := problem(block.get("language", ""), block.astext())) is not None:
            LOG.warning("invalid %s: %s", block.get("language"), wrong, location=block)


def setup(app):
    """Connect the check."""
    app.connect("doctree-read", check)
    return {"parallel_read_safe": True}
