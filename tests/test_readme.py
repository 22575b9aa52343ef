"""The figures of the README and of docs/performance.md are those of benchmarks/results."""

import re

from benchmarks.common import RESULTS, read_json
from benchmarks.readme import PAGES, PLACE, TABLES, filled

README, PERFORMANCE = (page.read_text(encoding="utf-8") for page in PAGES)


def test_tables_say_what_was_measured():
    assert sorted(place[2] for place in PLACE.finditer(README + PERFORMANCE)) == sorted(TABLES)
    for page in (README, PERFORMANCE):
        assert filled(page) == page, "python -m benchmarks.readme writes them anew"
    assert filled(README.replace("+10.0, 7.8 to 12.4", "+12.0, 7.8 to 12.4")) == README


def test_the_seconds_of_smol_are_measured():
    (said,) = re.findall(r"`conf=smol` took (\d+) s", README)
    found = read_json(RESULTS / "smol-h100.json")
    assert found["seconds_of_process"] == float(said)
