"""Invite tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.invites import PREFIX, InviteToken, parse_token
from fedmq.broker.errors import AccessError

TOKEN = InviteToken("tcp://broker.example:7700", KeyPair.new().public, KeyPair.new())


def test_a_token_is_one_line_and_is_read_back():
    text = TOKEN.text()
    assert text.startswith(PREFIX)
    assert len(text.split()) == 1
    assert parse_token(f"  {text}\n") == TOKEN
    assert TOKEN.own.secret not in repr(TOKEN)


@pytest.mark.parametrize("text", ["", "fedmq", "fedmq-invite-2:abc", "hello world"])
def test_other_text_is_refused(text):
    with pytest.raises(AccessError, match=f"expected an invite that begins with {PREFIX}"):
        parse_token(text)


@given(st.data())
def test_a_token_with_a_missing_or_changed_character_is_refused(data):
    text = TOKEN.text()
    at = data.draw(st.integers(len(PREFIX), len(text) - 1))
    new = data.draw(st.sampled_from(["", "A", "-", "=", " ", "é", "\0"]))
    changed = text[:at] + new + text[at + 1 :]
    try:
        found = parse_token(changed)
    except AccessError:
        assert changed != text
    else:
        assert found == TOKEN  # also if only bits that pad the last character differ


def test_an_endless_text_is_refused():
    with pytest.raises(AccessError, match="expected one invite, got"):
        parse_token(TOKEN.text() + "A" * 5000)
