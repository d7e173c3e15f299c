"""The access file: edits, invites, concurrent writers, and ends at any point."""

import contextlib
import itertools
import multiprocessing
import os

import msgspec
import pytest

from fedmq.broker.access.access_file import ACCESS_FILE, AccessFile
from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.rights import LOCAL, Invite, Rights
from fedmq.broker.errors import AccessError

FORK = multiprocessing.get_context("fork")


def key():
    return KeyPair.new().public


def worker(name, public=None):
    return Rights(name=name, key=public or key(), roles=("worker",), clients=((0, 9),))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


@pytest.fixture
def file(folder):
    return AccessFile(folder)


def test_without_a_file_no_key_is_authorised(file):
    access = file.load()
    assert access.keys == access.invites == {}
    assert access.keyless is LOCAL
    assert not file.changed()


def test_authorised_keys_are_read_back_and_a_broker_notices(file, folder):
    broker = AccessFile(folder)
    broker.load()
    rights = worker("w1")
    file.authorize(rights)
    assert broker.changed()
    assert broker.load().keys == {rights.key: rights}
    assert not broker.changed()
    assert (folder / ACCESS_FILE).stat().st_mode & 0o777 == 0o600
    (folder / ACCESS_FILE).rename(folder / "elsewhere")
    assert broker.changed()
    with pytest.raises(AccessError, match="is missing: restore it"):
        broker.load()
    assert not broker.changed()
    (folder / "elsewhere").rename(folder / ACCESS_FILE)
    assert broker.changed()
    assert broker.load().keys == {rights.key: rights}


def test_the_same_key_and_name_changes_the_rights(file):
    rights = worker("w1")
    file.authorize(rights)
    file.authorize(msgspec.structs.replace(rights, clients=None, read_files=True))
    (only,) = file.load().keys.values()
    assert only.read_files
    assert only.clients is None


def test_a_name_or_key_in_use_is_refused(file):
    rights = worker("w1")
    file.authorize(rights)
    with pytest.raises(AccessError, match=r"the name 'w1' is in use"):
        file.authorize(worker("w1"))
    with pytest.raises(AccessError, match=r"the key .* is in use: its name is 'w1'"):
        file.authorize(worker("w2", rights.key))
    assert file.load().keys == {rights.key: rights}


def test_a_replaced_key_hands_over_its_name_and_rights(file):
    rights, second, third = worker("w1"), key(), key()
    file.authorize(rights)
    file.replace("w1", second)
    new = file.replace("w1", third)
    assert new == msgspec.structs.replace(rights, key=third, replaces=(rights.key, second))
    assert file.load().keys == {third: new}
    file.authorize(msgspec.structs.replace(new, clients=None, replaces=()))
    assert file.load().keys[third].replaces == (rights.key, second)
    with pytest.raises(AccessError, match=r"no key has the name 'w9': there are w1"):
        file.replace("w9", key())


def test_a_key_that_was_revoked_keeps_its_nodes_when_it_is_authorised_again(file):
    old, new = worker("w1"), key()
    file.authorize(old)
    file.replace("w1", new)
    file.revoke("w1")
    with pytest.raises(AccessError, match=r"was revoked: .* --replace w1"):
        file.authorize(worker("w2", new))
    file.replace("w1", new)
    assert file.load().keys[new].replaces == (old.key,)


def test_a_key_that_came_with_another_invite_takes_an_old_place(file):
    old, new = worker("w1"), worker("invite-2")
    file.authorize(old)
    file.authorize(new)
    given = file.replace("w1", new.key)
    assert given == msgspec.structs.replace(old, key=new.key, replaces=(old.key,))
    assert file.load().keys == {new.key: given}
    with pytest.raises(AccessError, match="the key 'w1' has replaced this key"):
        file.replace("w1", old.key)


def test_a_replaced_key_is_not_authorised_beside_the_key_that_has_its_nodes(file):
    old = worker("w1")
    file.authorize(old)
    file.replace("w1", key())
    with pytest.raises(AccessError, match="the key 'w1' has replaced this key"):
        file.authorize(worker("w2", old.key))


def test_a_key_that_was_revoked_hands_over_its_name_and_rights_later(file):
    rights, second = worker("w1"), key()
    file.authorize(rights)
    file.revoke("w1")
    assert file.revoked() == (rights,)
    new = file.replace("w1", second)
    assert new == msgspec.structs.replace(rights, key=second, replaces=(rights.key,))
    assert file.load().keys == {second: new}
    assert file.revoked() == ()
    file.revoke(second)
    assert file.replace("w1", second) == new  # revoked by mistake, and given back its rights
    assert file.revoked() == ()
    file.revoke("w1")
    file.authorize(other := worker("w1"))
    file.revoke("w1")
    assert file.revoked() == (other,)


def test_revoking_by_name_or_key(file):
    one, two = worker("w1"), worker("w2")
    file.authorize(one)
    file.authorize(two)
    assert file.revoke("w1") == one
    assert file.revoke(two.key) == two
    assert file.load().keys == {}
    with pytest.raises(AccessError, match=r"no key or invite is 'w1': there are none"):
        file.revoke("w1")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"name": "../x"}, "invalid name of a key"),
        ({"name": "local"}, "reserved"),
        ({"key": "x"}, "expected the public key of w1"),
        ({"roles": ("king",)}, "expected roles out of .*, got 'king'"),
        ({"roles": ()}, "expected roles out of .*, got none"),
        ({"clients": ((3, 1),)}, "expected clients LOW-HIGH, got 3-1"),
        ({"runs": ("a/b",)}, "invalid name of a run"),
    ],
)
def test_invalid_rights_are_refused(file, wrong, reason):
    with pytest.raises(AccessError, match=reason):
        file.authorize(msgspec.structs.replace(worker("w1"), **wrong))
    assert file.load().keys == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "truncated"),
        ("[]", r"Expected `object`"),
        ('{"keys": [{"name": 3}]}', r"\$\.keys\[0\]\.name"),
        ('{"keys": [], "kyes": []}', "unknown field `kyes`"),
        ('{"keys": [{"name": "a", "only_on_mondays": true}]}', "unknown field `only_on_mondays`"),
        ('{"format": 2}', "expected format 1, got 2"),
        ('{"keys": [{"name": "a", "key": "x"}]}', "expected the public key of a"),
    ],
)
def test_a_damaged_file_is_named(file, folder, text, reason):
    file.authorize(worker("w1"))
    (folder / ACCESS_FILE).write_text(text)
    assert file.changed()
    with pytest.raises(AccessError, match=rf"access.json is invalid: .*{reason}"):
        file.load()
    assert not file.changed()  # a broker reports it once
    with pytest.raises(AccessError):
        file.authorize(worker("w2"))
    assert (folder / ACCESS_FILE).read_text() == text


def test_a_file_that_vanishes_revokes_nobody_and_counts_again_once_restored(file, folder):
    file.authorize(worker("w1"))
    before = file.load()
    path = folder / ACCESS_FILE
    path.rename(folder / "backup")
    assert file.changed()
    with pytest.raises(AccessError, match=r"access.json is missing: restore it"):
        file.load()
    assert not file.changed()  # a broker reports it once
    (folder / "backup").rename(path)
    assert file.changed()
    assert file.load() == before


def test_a_file_that_others_may_write_is_refused(file, folder):
    file.authorize(worker("w1"))
    (folder / ACCESS_FILE).chmod(0o620)
    with pytest.raises(AccessError, match="chmod 600"):
        file.load()


# ---- invites


def test_an_invite_enrolls_as_many_keys_as_it_has_uses(file):
    pair = file.invite(worker("lab"), uses=2, expires_at=100.0)
    one, two, three = key(), key(), key()
    access = file.enroll(one, pair.public, 1.0)
    assert access.keys[one] == Rights(name="lab-1", key=one, roles=("worker",), clients=((0, 9),))
    assert file.enroll(one, pair.public, 999.0) == access  # again: also once it has expired
    access = file.enroll(two, pair.public, 2.0)
    assert access.keys[two].name == "lab-2"
    assert access.invites[pair.public] == Invite(
        rights=msgspec.structs.replace(worker("lab"), key=pair.public),
        uses=0,
        expires_at=100.0,
        enrolled=(one, two),
    )
    with pytest.raises(AccessError, match="no uses left"):
        file.enroll(three, pair.public, 3.0)
    assert file.load() == access


def test_an_invite_that_has_expired_or_was_revoked_enrolls_nobody(file):
    pair = file.invite(worker("lab"), uses=2, expires_at=100.0)
    with pytest.raises(AccessError, match="has expired"):
        file.enroll(key(), pair.public, 100.0)
    known = key()
    file.enroll(known, pair.public, 99.0)
    file.revoke("lab-1")
    with pytest.raises(AccessError, match="and revoked later"):
        file.enroll(known, pair.public, 99.0)
    file.revoke("lab")
    with pytest.raises(AccessError, match="the invite was revoked"):
        file.enroll(key(), pair.public, 99.0)
    assert file.load().keys == {}


def test_an_enrolled_key_gets_a_free_name(file):
    file.authorize(worker("lab-1"))
    pair = file.invite(worker("lab"), uses=1, expires_at=100.0)
    new = key()
    assert file.enroll(new, pair.public, 1.0).keys[new].name == "lab-2"


def test_a_key_that_is_in_use_or_none_is_not_enrolled(file):
    rights = worker("w1")
    file.authorize(rights)
    pair = file.invite(worker("lab"), uses=1, expires_at=100.0)
    for wrong in (rights.key, pair.public, "x" * 39, "~" * 40):
        with pytest.raises(AccessError):
            file.enroll(wrong, pair.public, 1.0)
    assert file.load().invites[pair.public].uses == 1


# ---- several processes, and their ends


def run_all(*jobs):
    """Run functions in processes of their own, at once."""
    processes = [FORK.Process(target=job, args=rest) for job, *rest in jobs]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    return [each.exitcode for each in processes]


def authorize_many(folder, first, keys):
    for number, each in enumerate(keys):
        AccessFile(folder).authorize(worker(f"w{first + number}", each))


@pytest.mark.end_to_end
def test_processes_that_edit_at_once_lose_nothing(file, folder):
    keys = [[key() for _ in range(8)] for _ in range(3)]
    jobs = [(authorize_many, folder, 8 * index, each) for index, each in enumerate(keys)]
    assert run_all(*jobs) == [0, 0, 0]
    assert file.load().keys.keys() == set(itertools.chain(*keys))


def enroll_many(folder, invite, keys):
    for each in keys:
        with contextlib.suppress(AccessError):  # no uses left
            AccessFile(folder).enroll(each, invite, 1.0)


@pytest.mark.end_to_end
def test_uses_are_never_exceeded_by_enrolments_at_once(file, folder):
    pair = file.invite(worker("lab"), uses=7, expires_at=100.0)
    keys = [[key() for _ in range(4)] for _ in range(3)]
    assert run_all(*[(enroll_many, folder, pair.public, each) for each in keys]) == [0, 0, 0]
    access = file.load()
    assert len(access.keys) == 7
    assert access.invites[pair.public].uses == 0


def enroll_and_die(folder, new, invite, call, number):
    """End without cleaning up at a call of the operating system."""
    real = getattr(os, call)
    calls = itertools.count(1)

    def dying(*args, **more):
        if next(calls) == number:
            os._exit(9)
        return real(*args, **more)

    setattr(os, call, dying)
    AccessFile(folder).enroll(new, invite, 1.0)
    os._exit(0)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("call", "number", "stored"),
    [("fsync", 1, False), ("replace", 1, False), ("fsync", 2, True), ("close", 1, True)],
)
def test_a_process_that_is_killed_leaves_the_old_state_or_the_new(
    file, folder, call, number, stored
):
    pair = file.invite(worker("lab"), uses=1, expires_at=100.0)
    before, new = file.load(), key()
    assert run_all((enroll_and_die, folder, new, pair.public, call, number)) == [9]
    after = file.load()
    assert (after != before) == stored
    assert (new in after.keys) == stored
    assert file.enroll(new, pair.public, 2.0).keys[new].name == "lab-1"  # the node tries again
