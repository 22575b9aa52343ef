"""The README's figures are those of benchmarks/results."""

import re
from pathlib import Path

from benchmarks.common import RESULTS, read_json
from benchmarks.readme import PLACE, TABLES, filled

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_its_tables_say_what_was_measured():
    assert sorted(place[2] for place in PLACE.finditer(README)) == sorted(TABLES)
    assert filled(README) == README, "python -m benchmarks.readme writes them anew"
    assert filled(README.replace("+10.0, 7.8 to 12.4", "+12.0, 7.8 to 12.4")) == README


def test_the_seconds_of_smol_are_measured():
    (said,) = re.findall(r"`conf=smol` took (\d+) s", README)
    found = read_json(RESULTS / "smol-h100.json")
    assert found["seconds_of_process"] == float(said)
