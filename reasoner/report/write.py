"""The page as one file: its own code, style and data inside, and a policy that lets nothing else run or load.

Texts in it were written by models and files. They stand in a JSON element that can't be left, reach the page as text
nodes alone, and the content security policy names the hashes of the only scripts that may run.
"""

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reasoner import disk
from reasoner.errors import ConfigError
from reasoner.redact import Redactor
from reasoner.report.chosen import as_json
from reasoner.report.content import content
from reasoner.report.source import read_source

REPORT, REPORT_ERROR = "report.html", "report_error.txt"
COMPARISON = "comparison.html"
MAX_RUNS = 6  # as many colours as can be told apart
HERE = Path(__file__).parent
SCRIPTS = ("format", "charts", "sections", "texts", "page")  # of page/, in this order, as one script
LICENCE = "uPlot (https://github.com/leeoniya/uPlot), MIT licence"


def write_report(runs: Sequence[Path], to: Path) -> list[str]:
    """Write the page about one run, or about several against the first, into `to`. Returns the titles of the bad signs
    that it flags.

    Raises RunFolderError where a folder holds no run, a file of it is damaged, or the disk refuses; ConfigError for too
    many runs or the same one twice.
    """
    if len({run.resolve() for run in runs}) < len(runs) or len(runs) > MAX_RUNS:
        raise ConfigError(f"report takes up to {MAX_RUNS} different runs, not {' '.join(f'run={run}' for run in runs)}")
    data = gather(runs)
    try:
        disk.replace(to, page(data))
    except OSError as error:
        raise disk.refusal(error, f"write {to}", "choose another file with to=FILE") from error
    return [flag["title"] for run in data["runs"] for flag in run["flags"] if flag["tone"] == "bad"]


def gather(runs: Sequence[Path]) -> dict[str, Any]:
    """What content.py finds in the runs, without what looks like a secret."""
    return Redactor.from_environment().tree(content([read_source(run) for run in runs]))


def page(data: Mapping[str, Any]) -> bytes:
    """The page's bytes, UTF-8, of what was gathered."""
    style = _read("uplot/uPlot.min.css") + _read("page/page.css")
    library = f"/*! {LICENCE}\n{_read('uplot/LICENSE')}*/\n{_read('uplot/uPlot.iife.min.js')}"
    own = "(() => {\n'use strict';\n" + "\n".join(_read(f"page/{name}.js") for name in SCRIPTS) + "\n})();"
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(own)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "TITLE": html.escape(" · ".join(run["name"] for run in data["runs"])),
        "POLICY": html.escape(policy),
        "STYLE": style,
        "LIBRARY": library,
        "SCRIPT": own,
        "DATA": as_json(data).decode(),
    }
    # In one pass, so that no text can name another's place.
    return re.sub(r"%([A-Z]+)%", lambda place: parts[place[1]], _read("page/page.html")).encode()


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
