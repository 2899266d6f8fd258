"""The mutants can be made: ``python tests/mutants.py`` does not end at one without a place."""

from __future__ import annotations

from mutants import MUTANTS, ROOT


def test_each_has_a_name_and_a_place():
    places = {each.name: (ROOT / each.file, each.before) for each in MUTANTS}
    assert len(places) == len(MUTANTS)
    assert not [name for name, (file, text) in places.items() if file.read_text().count(text) != 1]
