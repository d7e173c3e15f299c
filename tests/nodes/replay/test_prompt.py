"""``--shell``: a prompt on the state at an entry; and which options can be combined."""

import pytest
from click.testing import CliRunner

from fedmq.nodes.cli.main import main
from tests.nodes.replay.material import (
    BUFFERED,
    closing,
    edit,
    inbox,
    messages,
    nth,
    number,
    replay,
    rewrite,
)
from tests.own_code import ALLOW


def prompt(*words, lines="", code=0):
    result = CliRunner().invoke(main, ["replay", *ALLOW, *map(str, words), "--shell"], input=lines)
    assert result.exit_code == code, result.output
    return result.output


def test_the_state_of_a_moment_is_there():
    seq, version = nth(BUFFERED, 1, kind="version")
    output = prompt(
        BUFFERED,
        "--until",
        seq,
        lines="print('v', core.version)\nprint('r', parts['results'])\n"
        "print('e', event.seq, [a.message.id for a in actions if hasattr(a, 'message')][0])\n"
        "print('s', setup.schedule.size, trace.run)\n",
    )
    assert "v 2\n" in output
    assert "r 0\n" in output
    assert f"e {version.body['position']} {version.id}\n" in output
    assert "s 3 simulated\n" in output
    assert "step(n)" in output


def test_the_prompt_steps_on():
    """From one result before version 1 to that version, and on to the next."""
    taken = inbox(BUFFERED)
    first, second = closing(BUFFERED, 1), closing(BUFFERED, 2)
    before = taken[taken.index(first) - 1]
    count = taken.index(second) - taken.index(first)
    output = prompt(
        BUFFERED,
        "--until",
        before,
        lines="print('a', event.seq, parts['results'])\nprint('b', step().seq)\n"
        "print('c', event.seq, parts['version'])\n"
        f"print('d', step({count}).seq, core.version)\n",
    )
    assert f"a {before} 2\n" in output
    assert f"b {first}\n" in output
    assert f"c {first} 1\n" in output
    assert f"d {second} 2\n" in output


def test_the_prompt_steps_to_the_end_and_no_further():
    lines = "print('a', step(10**6).seq, core.version)\nprint('b', step().seq)\n"
    output = prompt(BUFFERED, "--until", 0, lines=lines)
    last = inbox(BUFFERED)[-1]
    assert f"a {last} 12\n" in output
    assert f"b {last}\n" in output


def test_ctrl_d_leaves_at_once():
    assert "Ctrl-D leaves" in prompt(BUFFERED)
    assert "Ctrl-D leaves" in prompt(BUFFERED, "--from-checkpoint")


def test_at_the_start_there_is_no_message():
    assert "None Start\n" in prompt(
        BUFFERED, "--until", 1, lines="print(getattr(event, 'seq', None), type(event).__name__)\n"
    )


def test_an_error_at_the_prompt_does_not_end_it():
    output = prompt(BUFFERED, lines="1 / 0\nprint('still', 'here')\n")
    assert "ZeroDivisionError" in output
    assert "still here" in output


def test_a_difference_opens_the_prompt_where_it_is(tmp_path):
    seq = number(BUFFERED, 1, kind="version")
    folder = rewrite(BUFFERED, tmp_path, {seq: edit(body={"used": 0})})
    output = prompt(folder, lines="print('v', core.version)\n", code=1)
    assert f"message {seq} differs" in output
    made = sum(each.body["position"] < seq for _, each in messages(BUFFERED, kind="version"))
    assert f"v {made}\n" in output


# ---- options


@pytest.mark.parametrize(
    "words",
    [
        ["--task", "aggregator/2"],
        ["--worker", "worker-0", "--until", "3"],
        ["--worker", "worker-0", "--shell"],
        ["--worker", "worker-0", "--from-checkpoint"],
        ["--worker", "worker-0", "--set", "schedule.size=2"],
        ["--worker", "worker-0", "--save", "x"],
        ["--worker", "worker-0", "--compare", "x"],
        ["--set", "schedule.size=2", "--until", "3"],
        ["--set", "schedule.size=2", "--shell"],
        ["--set", "schedule.size=2", "--from-checkpoint"],
        ["--set", "schedule.size=2", "--save", "x"],
        ["--set", "schedule.size=2", "--compare", "x"],
        ["--save", "x", "--compare", "y"],
        ["--save", "x", "--from-checkpoint"],
        ["--until", "-1"],
        ["--until", "soon"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_together_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = replay(BUFFERED, *words, code=2).output
    (sentence,) = [line for line in output.split("\n") if line.startswith("fedmq: ")]
    assert words[0] in sentence
    assert not list(tmp_path.iterdir())
