"""Specs: ``name(value, key=value) | name``."""

import keyword
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import Call, build, parse, parse_one
from fedmq.codecs.text import unknown

CONSTANTS = {"True", "False", "None"}

words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda word: not keyword.iskeyword(word)
)
letters = string.ascii_letters + string.digits + " .,;:=()[]{}'\"\\#*/+-\n\t"
strings = words | st.text(letters, max_size=12).filter(
    lambda text: not keyword.iskeyword(text) and text not in CONSTANTS
)
values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | strings
)
calls = st.builds(
    Call,
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True),
    st.lists(values, max_size=3).map(tuple),
    st.dictionaries(words, values, max_size=3),
)


def same(one, other):
    """Return whether two calls are equal; 1, 1.0 and True differ."""
    return repr(one) == repr(other)


@given(calls)
@settings(deadline=None)
def test_the_text_of_a_call_parses_back_to_it(call):
    assert same(parse_one(str(call)), call)


@pytest.mark.slow
@given(st.lists(calls, min_size=1, max_size=4))
@settings(deadline=None)
def test_a_pipeline_is_read_in_order(several):
    assert same(parse(" | ".join(map(str, several))), several)


@pytest.mark.parametrize(
    "value", ["True", "None", "if", "a|b", "\N{LATIN SMALL LIGATURE FI}", 1e999]
)
def test_the_text_of_an_awkward_value_parses_back_to_it_too(value):
    call = Call("f", (value,))
    assert same(parse_one(str(call)), call)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("raw", Call("raw")),
        ("raw()", Call("raw")),
        ("  by-writer ( ) ", Call("by-writer")),
        ("hinge(10, 4)", Call("hinge", (10, 4))),
        ("f(-0.5, 1e-3)", Call("f", (-0.5, 0.001))),
        ("cast(float16)", Call("cast", ("float16",))),
        ("cast('float16')", Call("cast", ("float16",))),
        ("f(1, b=True, c=None)", Call("f", (1,), {"b": True, "c": None})),
    ],
)
def test_calls_read_as_they_look(text, call):
    assert same(parse_one(text), call)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "|",
        "raw |",
        "1f",
        "f(",
        "f)",
        "f(1))",
        "f(1)(2)",
        "f(1) g",
        "f(1, a=2, 3)",
        "f(a=1, a=2)",
        "f(*a)",
        "f(**a)",
        "f([1])",
        "f((1, 2))",
        "f(1 + 1)",
        "f(-True)",
        "f(-'a')",
        "f(1j)",
        "f(b'a')",
        "f(...)",
        "f(g(1))",
        "f(a.b)",
        "f(\x00)",
        "f(" + "(" * 500 + ")" * 500 + ")",
        "f(" + "9" * 5000 + ")",
    ],
)
def test_invalid_specs_are_rejected(text):
    with pytest.raises(SpecError):
        parse_one(text)


@given(st.text(letters + "fxab|", max_size=30) | st.text(max_size=30))
@settings(deadline=None)
def test_random_texts_are_rejected(text):
    try:
        found = parse(text)
    except SpecError:
        return
    assert all(isinstance(call, Call) for call in found)


@pytest.mark.parametrize(
    "inside",
    [
        "open({path!r}, 'w')",
        "__import__('pathlib').Path({path!r}).touch()",
        "[open({path!r}, 'w') for _ in 'a']",
        "(lambda: open({path!r}, 'w'))()",
        "a=open({path!r}, 'w')",
        "f'{{open({path!r}, chr(119))}}'",
        "x := open({path!r}, 'w')",
    ],
)
def test_no_code_in_a_spec_is_run(inside, tmp_path):
    path = tmp_path / "written"
    with pytest.raises(SpecError):
        build(f"f({inside.format(path=str(path))})", {"f": lambda *a, **k: None}, "thing")
    assert not path.exists()


def test_only_choices_are_called():
    assert build("pair(1, b=2)", {"pair": lambda a, b: (a, b)}, "thing") == (1, 2)
    with pytest.raises(SpecError, match="unknown thing 'dict'; choose from pair"):
        build("dict(1)", {"pair": lambda a, b: (a, b)}, "thing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pair(1)", r"thing 'pair\(1\)': missing a required argument: 'b'; expected pair\(a, b\)"),
        ("pair(1, 2, 3)", r"too many positional arguments; expected pair\(a, b\)"),
        ("pair(1, c=2)", r"expected pair\(a, b\)"),
        ("pair(1, x)", r"thing 'pair\(1, x\)': .*unsupported operand"),
    ],
)
def test_the_error_names_invalid_arguments(text, message):
    with pytest.raises(SpecError, match=message):
        build(text, {"pair": lambda a, b: a - b}, "thing")


def test_the_error_suggests_a_similar_name():
    assert unknown("codec", "rav", {"raw": 1, "cast": 2}) == (
        "unknown codec 'rav' (did you mean 'raw'?); choose from cast, raw"
    )
