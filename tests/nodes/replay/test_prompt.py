"""``--shell``: a prompt on the state at a moment; and which options go together."""

import pytest
from click.testing import CliRunner

from fedmq.nodes.cli import main
from tests.nodes.replay.material import BUFFERED, edit, replay, rewrite
from tests.own_code import ALLOW


def prompt(*words, lines="", code=0):
    result = CliRunner().invoke(main, ["replay", *ALLOW, *map(str, words), "--shell"], input=lines)
    assert result.exit_code == code, result.output
    return result.output


def test_the_state_of_a_moment_is_there():
    output = prompt(
        BUFFERED,
        "--until",
        29,
        lines="print('v', core.version)\nprint('r', parts['results'])\n"
        "print('e', event.seq, [a.message.id for a in actions if hasattr(a, 'message')][0])\n"
        "print('s', setup.schedule.size, trace.run)\n",
    )
    assert "v 2\n" in output
    assert "r 0\n" in output
    assert "e 17 aggregator/13\n" in output
    assert "s 3 simulated\n" in output
    assert "step(n)" in output


def test_the_prompt_steps_on():
    output = prompt(
        BUFFERED,
        "--until",
        13,
        lines="print('a', event.seq, parts['results'])\nprint('b', step().seq)\n"
        "print('c', event.seq, parts['version'])\nprint('d', step(3).seq, core.version)\n",
    )
    assert "a 13 2\n" in output
    assert "b 14\n" in output
    assert "c 14 1\n" in output
    assert "d 17 2\n" in output


def test_the_prompt_steps_to_the_end_and_no_further():
    lines = "print('a', step(10**6).seq, core.version)\nprint('b', step().seq)\n"
    output = prompt(BUFFERED, "--until", 0, lines=lines)
    assert "a 170 12\n" in output
    assert "b 170\n" in output


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
    folder = rewrite(BUFFERED, tmp_path, {29: edit(body={"used": 0})})
    output = prompt(folder, lines="print('v', core.version)\n", code=1)
    assert "message 29 differs" in output
    assert "v 2\n" in output


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
        ["--worker", "worker-0", "--against", "x"],
        ["--set", "schedule.size=2", "--until", "3"],
        ["--set", "schedule.size=2", "--shell"],
        ["--set", "schedule.size=2", "--from-checkpoint"],
        ["--set", "schedule.size=2", "--save", "x"],
        ["--set", "schedule.size=2", "--against", "x"],
        ["--save", "x", "--against", "y"],
        ["--save", "x", "--from-checkpoint"],
        ["--until", "-1"],
        ["--until", "soon"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_together_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = replay(BUFFERED, *words, code=2).output
    (sentence,) = [line for line in output.split("\n") if line.startswith("Error: ")]
    assert words[0] in sentence
    assert not list(tmp_path.iterdir())
