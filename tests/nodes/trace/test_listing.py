import re
import subprocess
import sys
from collections import Counter

import pytest

from fedmq.broker.inspection.trace import Trace
from fedmq.nodes.trace.listing import Columns, rows
from fedmq.nodes.trace.overview import Overview
from tests.nodes.trace import story


def numbers(result):
    """Return the numbers of the entries that were listed."""
    return [int(line.split()[0]) for line in result.stdout.splitlines()]


def line_of(result, seq):
    return next(each for each in result.stdout.splitlines() if int(each.split()[0]) == seq)


def test_ls_lists_every_entry_but_the_consumed_ones(fedmq, written):
    folder, at = written
    everything = list(range(at["ended"] + 1))
    listed = numbers(fedmq("ls", folder))
    assert listed == [seq for seq in everything if seq != at["consumed"]]
    assert numbers(fedmq("ls", folder, "--all")) == everything
    assert numbers(fedmq("ls", folder / "ledger", "--kind", "consumed")) == [at["consumed"]]


def test_a_line_has_kind_path_version_id_and_answered_entry(fedmq, written):
    folder, at = written
    result = fedmq("ls", folder)
    words = line_of(result, at["task"]).split()
    assert words[1:] == [
        "3.500",
        "task",
        "aggregator",
        "->",
        "client/0@worker-0",
        "v0",
        "a/2",
        "-",
        "24",
    ]
    line = line_of(result, at["result"])
    assert "client/0@worker-0 -> aggregator  " in line
    assert line.split()[6:9] == ["v0", "a/2/result", str(at["task"])]
    assert "staleness 0, n 10, elapsed 0.250 s" in line
    assert "v0" in line_of(result, at["score"]), "a score is about the model that was evaluated"
    assert "accuracy 0.5, loss nan" in line_of(result, at["score"])
    assert "2 results" in line_of(result, at["version"])
    # Nobody hosts this client any more.
    assert "-> client/2 " in line_of(result, at["pending"])


def test_columns_are_aligned(fedmq, written):
    words = ("--kind", "task", "--kind", "result", "--kind", "version")
    lines = fedmq("ls", written[0], *words).stdout.splitlines()
    assert len({re.search(r" v\d+ ", line).end() for line in lines}) == 1


def test_rejected_messages_say_why(fedmq, written):
    folder, at = written
    result = fedmq("ls", folder, "--rejected")
    assert numbers(result) == [at["stale"], at["post"]]
    assert "rejected by aggregator: too stale" in line_of(result, at["stale"])
    assert "rejected before it was accepted: no such address" in line_of(result, at["post"])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--kind", "score"], ["score"]),
        (["--kind", "score", "--kind", "left"], ["score", "left"]),
        (["--client", "0"], ["task", "result"]),
        (["--node", "evaluator", "--from", "3"], ["evaluate", "score"]),
        (["--node", "worker-1", "--kind", "left"], ["left"]),
        (["--versions", "1", "--kind", "task", "--from", "8"], ["pending"]),
        (["--versions", "1-", "--kind", "version"], ["version"]),
        (["--versions", "0-0", "--kind", "result"], ["result", "half", "stale"]),
        (["--versions", "1-3", "--kind", "failed"], ["failed"]),
        (["--from", "3.5", "--to", "3.5"], ["task"]),
    ],
)
def test_filters(fedmq, written, words, names):
    folder, at = written
    assert numbers(fedmq("ls", folder, *words)) == [at[name] for name in names]


def test_a_filter_that_takes_nothing_reports_it(fedmq, written):
    for words in (
        ["--kind", "tick"],
        ["--kind", "continued"],
        ["--from", "9e9"],
        ["--kind", "score"],
    ):
        result = fedmq("ls", written[0], *words, "--versions", "1", "--rejected")
        assert result.stdout == ""
        assert result.stderr == "fedmq: no entries match\n"


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (
            ["--kind", "taks"],
            "--kind: expected a kind .availability, consumed, .*got 'taks' .*'task'",
        ),
        (["--kind", "task", "--kind", "nonsense"], "--kind: expected a kind .*got 'nonsense'$"),
        (["--node", "worker-9"], "--node: expected a node of this run .*worker-1.*got 'worker-9'"),
        (["--client", "10"], "--client: expected a client of this run, 0 to 3, got 10"),
        (["--versions", "50-60"], "--versions: expected versions of this run, 0 to [0-9]+, got 50"),
        (["--versions", "50-"], "--versions: expected versions of this run"),
    ],
)
def test_a_filter_for_what_is_not_there_names_the_choices(fedmq, written, words, output):
    result = fedmq("ls", written[0], *words, code=2)
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert re.match(f"fedmq: {output}", line)


def test_of_a_damaged_trace_what_is_asked_for_may_lie_behind_the_damage(fedmq, tmp_path):
    story.write(tmp_path)
    [path] = tmp_path.glob("messages-*.log")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + b"x" + whole[-99:])
    for words in (["--node", "worker-9"], ["--versions", "50"]):
        result = fedmq("ls", tmp_path, *words, code=1)
        assert "no entries match" in result.stderr
        assert "damaged" in result.stderr


def test_lines_fit_the_terminal_and_lose_nothing(written, simulated):
    for folder in (written[0], simulated(2, 3)):
        opened = Trace(folder)
        overview = Overview(opened)
        columns = Columns.of(overview)
        for row in rows(opened, overview):
            [line] = row.lines(columns, None)
            for room in (60, 80, 120):
                lines = row.lines(columns, room)
                words = " ".join(lines).split()
                assert [each for each in lines if len(each) > room and " " in each.strip()] == []
                assert set(f"{row.id} {row.note}".split()) <= set(words)
                assert words[:3] == line.split()[:3]
            assert row.lines(columns, 10_000) == [line]
        assert max(map(len, columns.head(80))) <= 80


def test_of_a_run_with_trouble_every_entry_is_listed(fedmq, simulated):
    folder = simulated(2, 3)
    entries = list(Trace(folder).entries())
    assert numbers(fedmq("ls", folder, "--all")) == [each.seq for each in entries]
    results = fedmq("ls", folder, "--kind", "result").stdout.splitlines()
    hosts = Counter(line.split()[3].split("@")[1] for line in results)
    assert set(hosts) == {"worker-0", "worker-1"}


def test_hostile_names_cannot_drive_the_terminal(fedmq, written):
    folder, at = written
    for words in (
        ["ls", folder, "--all"],
        ["show", folder, at["evil"]],
        ["stats", folder],
        ["export", folder, "--json", "-"],
        ["export", folder, "--perfetto", "-"],
    ):
        result = fedmq(*words)
        for character in "\x1b\u202e\x07":
            assert character not in result.stdout + result.stderr
    assert "evil\\x1b[31m\\u202e\\x20name -> record" in fedmq("ls", folder).stdout
    assert numbers(fedmq("ls", folder, "--node", story.EVIL)) == [at["evil"]]


def test_several_runs_in_one_ledger(fedmq, tmp_path):
    first = story.write(tmp_path, "one")
    second = story.write(tmp_path, "two")
    assert "one, two" in fedmq("ls", tmp_path, code=2).stderr
    listed = numbers(fedmq("ls", tmp_path, "--run-id", "two", "--all"))
    assert listed == list(range(second["opened"], second["ended"] + 1))
    fedmq("show", tmp_path, first["task"], "--run-id", "one")
    output = fedmq("show", tmp_path, first["task"], "--run-id", "two", code=2).stderr
    assert "expected one of run 'two', got one of 'one'" in output
    for run in ("one", "two"):
        output = fedmq("stats", tmp_path, "--run-id", run).stdout
        assert "accepted 19 = consumed 8 + pending 10 + rejected 1: holds" in output
    same = fedmq("diff", tmp_path, tmp_path, "--run-id", "one", "--run-id", "two")
    assert "all equal" in same.stdout


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["ls", "."], "expected a run's folder with a ledger"),
        (["ls", "RUN", "--versions", "5-2"], "the lower version first"),
        (["ls", "RUN", "--versions", "a-b"], "expected A-B"),
        (["ls", "RUN", "--from", "9", "--to", "2"], "expected --from before --to"),
        (["ls", "RUN", "--from", "nan"], "expected --from before --to"),
        (["ls", "RUN", "--client", "-1"], "--client"),
        (["ls", "RUN", "--run-id", "other"], "got 'other'"),
        (["show", "RUN", "999"], "entry 999 is not in the ledger: the last one is entry"),
        (["show", "RUN", "x"], "OFFSET"),
        (["export", "RUN"], "either --perfetto FILE or --json FILE"),
        (["export", "RUN", "--json", "a", "--perfetto", "b"], "either --perfetto"),
        (["export", "RUN", "--json", "/nowhere/at/all"], "cannot write /nowhere/at/all"),
        (["diff", "RUN", "."], "expected a run's folder with a ledger"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    fedmq, written, tmp_path, monkeypatch, words, output
):
    monkeypatch.chdir(tmp_path)
    result = fedmq(*[written[0] if each == "RUN" else each for each in words], code=2)
    assert output in result.stderr
    assert result.stdout == ""


@pytest.mark.end_to_end
def test_a_reader_that_goes_away_ends_the_listing_quietly(simulated, tmp_path):
    command = [sys.executable, "-m", "fedmq.nodes", "trace", "ls", str(simulated(2, 3))]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    _, output = program.communicate(timeout=30)
    assert output == b""


@pytest.mark.end_to_end
def test_listing_needs_no_torch(written):
    code = (
        "import sys\nfrom fedmq.nodes.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    for command in (["ls"], ["stats"], ["export", "--json", "-"], ["export", "--perfetto", "-"]):
        words = ["trace", command[0], str(written[0]), *command[1:]]
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("junk", [None, 7, "x", [1], {"a": 1}, float("inf"), 1 << 60, b"b"])
def test_bodies_that_are_no_such_bodies_are_listed_all_the_same(fedmq, tmp_path, junk):
    it = story.Writer(tmp_path)
    it.open()
    names = ("node", "role", "reason", "results", "mean_staleness", "max_staleness", "numbers")
    names += ("model_digest", "elapsed_s", "metrics", "token", "after_s", "version", "position")
    names += ("model_version", "client", "groups", "config", "by", "used")
    body = dict.fromkeys(names, junk)
    for kind in ("left", "version", "finished", "result", "score", "failed", "timer", "tick"):
        for sender in ("aggregator", "worker-0"):
            it.say(sender, kind, "aggregator", body, re="x", data=[b"\x81" * 5000])
    it.ledger.close()
    assert len(fedmq("ls", tmp_path).stdout.splitlines()) == 17
    fedmq("stats", tmp_path)
    fedmq("export", tmp_path, "--json", "-")
    fedmq("export", tmp_path, "--perfetto", "-")
    fedmq("show", tmp_path, 4)
    assert "all equal" in fedmq("diff", tmp_path, tmp_path).stdout
