"""Keys in which two configurations differ, and their text."""

import pytest

from fedmq.nodes.run.config_difference import differences, differing_keys, shown


def test_keys_are_compared_one_by_one():
    one = {"run": {"seed": 0, "target": None}, "worker": {"nodes": {}}, "flag": {"on": True}}
    other = {"run": {"seed": 0}, "worker": {"nodes": {"w": {"drop": 0.5}}}, "flag": {"on": 1}}
    found = {key: tuple(map(shown, pair)) for key, pair in differences(one, other).items()}
    assert found == {
        "run.target": ("none", "not set"),
        "worker.nodes.w.drop": ("not set", "0.5"),
        "flag.on": ("True", "1"),
    }


def test_both_values_are_shown_and_long_ones_are_cut():
    here = "[algorithm]\nlr = 0.1\nname = 'a'"
    there = f"[algorithm]\nname = 'a'\ntext = '{'x' * 1000}'"
    text = differing_keys(here, there)
    assert text.startswith("algorithm.lr (here 0.1, there not set), algorithm.text (here not set, ")
    assert text.endswith("xxx...)")
    assert len(text) < 250


def test_the_number_of_named_keys_is_bounded():
    keys = "".join(f"key_{number:02} = 1\n" for number in range(30))
    assert differing_keys(keys, "").endswith("key_09 (here 1, there not set) and 20 more")


@pytest.mark.parametrize("text", ["no toml", "x = " + "[" * 100_000])
def test_invalid_toml_differs_in_no_key(text):
    assert differing_keys("x = 1", text) == differing_keys(text, "x = 1") == ""
