"""A run that was recorded under one CPU capability of torch replays under the others.

What an averaging algorithm's aggregator computes is equal to the bit; where a server trains a
network, it lies within the tolerance.
"""

import platform

import pytest

from fedmq.algorithms.registry import ALGORITHMS
from fedmq.broker.inspection.trace import Trace
from fedmq.nodes.messages.payloads import unpack
from fedmq.nodes.run.devices import kind_of
from tests.cpus import X86, capabilities
from tests.nodes.replay import machines, material
from tests.nodes.replay.machines import MAIN

ONCE = tuple(name for name in machines.RUNS if name not in machines.MAIN)
TRAINED = tuple(name for name in ONCE if not ALGORITHMS[name].reproducible)
"""Of which the aggregator computes what is not the same everywhere."""
HOME = "default"
"""Where the runs of `ONCE` are recorded."""
PAIRS = [(a, b) for a in X86 for b in X86 if a != b]

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(
        platform.machine().lower() not in ("x86_64", "amd64"),
        reason="torch's CPU capabilities are of x86 processors",
    ),
    # All runs are recorded, and replayed, in the first test that needs them.
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return for each capability that this CPU has the folder of what was recorded under it."""
    folders = {}
    for wanted in capabilities():
        folders[wanted] = folder = tmp_path_factory.mktemp(wanted)
        names = MAIN + ONCE if wanted == HOME else MAIN
        machines.elsewhere(wanted, f"record_all({str(folder)!r}, {names!r})")
    return folders


@pytest.fixture(scope="module")
def replayed(runs):
    """Return what ``fedmq replay`` says: by capability, (exit code, output) by folder."""
    found = {}
    for wanted in runs:
        folders = [
            str(folder / name)
            for recorded, folder in runs.items()
            for name in machines.RUNS
            if (folder / name).exists() and (recorded != wanted or name in TRAINED)
        ]
        found[wanted] = machines.elsewhere(wanted, f"replay_all({folders!r})")
    return found


def needs(runs, *wanted):
    for each in wanted:
        if each not in runs:
            pytest.skip(f"this CPU has no {each}, or torch does not use it")


def text(runs, replayed, name, recorded, here):
    """Return the output of a replay that found no difference."""
    needs(runs, recorded, here)
    code, output = replayed[here][str(runs[recorded] / name)]
    assert code == 0, output
    return output


@pytest.mark.parametrize(("recorded", "here"), PAIRS)
@pytest.mark.parametrize("name", MAIN)
def test_every_schedule_replays_to_the_bit(runs, replayed, name, recorded, here):
    output = text(runs, replayed, name, recorded, here)
    assert " match the record\n" in output
    _, last = material.nth(runs[recorded] / name, -1, kind="version")
    assert f"version 6, model {last.body['model_digest']}" in output


@pytest.mark.parametrize("here", [each for each in X86 if each != HOME])
@pytest.mark.parametrize("name", [name for name in ONCE if name not in TRAINED])
def test_every_averaging_algorithm_replays_to_the_bit(runs, replayed, name, here):
    assert " match the record\n" in text(runs, replayed, name, HOME, here)


@pytest.mark.parametrize("name", TRAINED)
def test_a_server_that_trains_replays_to_the_bit_on_its_own_kind_of_cpu(runs, replayed, name):
    assert " match the record\n" in text(runs, replayed, name, HOME, HOME)


@pytest.mark.parametrize("here", [each for each in X86 if each != HOME])
@pytest.mark.parametrize("name", TRAINED)
def test_a_server_that_trains_replays_within_the_tolerance_elsewhere(runs, replayed, name, here):
    output = text(runs, replayed, name, HOME, here)
    assert " match the record within the tolerance\n" in output
    sentence = " ".join(output.split())
    assert f"{name} computes different last bits on cpu " in sentence
    assert f"than on cpu {HOME.upper()}" in sentence


# ---- that the runs are what the tests above need


@pytest.mark.parametrize("recorded", X86)
def test_the_record_names_the_kind_of_cpu(runs, recorded):
    needs(runs, recorded)
    for name in MAIN:
        _, run = material.nth(runs[recorded] / name, 0, kind="run")
        assert run.body["device"].startswith(f"cpu {recorded.upper()}, torch ")
        assert run.body["device"].split(",")[1] == kind_of("cpu").split(",")[1]


def test_each_algorithm_has_a_run():
    assert {algorithm["name"] for _, algorithm, _, _ in machines.RUNS.values()} == {*ALGORITHMS}
    assert set(TRAINED) < {*ALGORITHMS}


def test_clients_do_train_to_other_bits(runs):
    """Else a replay would be equal whatever the aggregator computed."""
    needs(runs, *X86[:2])
    digests = {
        material.nth(folder / name, -1, kind="version")[1].body["model_digest"]
        for name in MAIN
        for folder in runs.values()
    }
    assert len(digests) > len(MAIN)


@pytest.mark.parametrize("name", MAIN)
def test_the_codec_acts(runs, name):
    """A matrix of more than 1,000 values takes half a byte a value."""
    folder = runs[HOME] / name
    _, result = material.nth(folder, 0, kind="result")
    (group,) = [each for each in result.body["groups"] if each["name"] == "weights"]
    assert "hadamard" in group["codec"]
    assert "quantize" in group["codec"]
    payload = unpack(result, lambda index: Trace(folder).blob(result, index))
    values = sum(each.numel() for each in payload.weights.values())
    assert values > (70_000 if name == "rounds" else 1_600)
    size = sum(blob.size for blob in result.blobs[: group["buffers"]])
    assert size < 4 * values / (6 if name == "rounds" else 3)


@pytest.mark.parametrize("name", MAIN)
def test_a_worker_crashed(runs, name):
    joined = [each.body["node"] for _, each in material.messages(runs[HOME] / name, kind="joined")]
    assert max(joined.count(f"worker-{index}") for index in (0, 1)) > 1
