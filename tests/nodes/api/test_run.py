"""A recorded run as a Python object: curve, clients, messages, model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmq.broker.errors import LedgerDamage
from fedmq.nodes.api.array_table import ArrayTable
from fedmq.nodes.api.run import CURVE, Run, load
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.run_folder.model_files import save_model
from tests.algorithms.tiny import Tiny
from tests.nodes.trace import story


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def test_the_curve_has_a_row_for_each_evaluation(folder: Path) -> None:
    run = load(folder)
    assert run.status == "finished"
    assert list(run.curve)[: len(CURVE)] == list(CURVE)
    version, up = run.curve["version"], run.curve["bytes_up"]
    assert version.dtype == up.dtype == np.int64
    assert version[0] == 0
    assert version[-1] == run.summary["versions"]
    assert up[0] == 0
    assert (np.diff(up) > 0).all()
    assert up[-1] <= run.summary["bytes"]["up"]["payload"]
    assert run.curve["results_used"][-1] == run.summary["results"]["used"]
    assert np.isnan(run.curve["staleness"][0])
    assert run.curve.rows == len(version)
    with pytest.raises(KeyError, match="no column 'speed'; choose from version, wall_s"):
        run.curve["speed"]


def test_the_ledger_alone_is_enough(copy: Path) -> None:
    expected = load(copy)
    with_summary = {name: column.copy() for name, column in expected.curve.items()}
    (copy / "summary.json").unlink()
    for where in (copy, copy / "ledger"):
        alone = load(where)
        assert alone.folder == copy
        assert alone.summary["results"] == expected.summary["results"]
        for name, column in alone.curve.items():
            np.testing.assert_allclose(column, with_summary[name], atol=1e-3)


def test_the_summary_alone_is_enough_for_the_curve(copy: Path) -> None:
    shutil.rmtree(copy / "ledger")
    assert load(copy).curve.rows > 1
    (copy / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"summary\.json: expected the keys bytes, curve"):
        _ = load(copy).summary
    (copy / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="it is not JSON"):
        _ = load(copy).summary
    assert "cannot be read" in repr(load(copy))


def test_a_summary_of_an_older_release_is_computed_again(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    for point in summary["curve"]:
        del point["bytes_up"]
    (copy / "summary.json").write_text(json.dumps(summary))
    assert load(copy).curve["bytes_up"][-1] > 0


def test_metrics_have_their_own_names_and_missing_ones_are_nan(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    summary["curve"][0]["metrics"] = {"version": 7.0, "f1": 0.5}
    summary["curve"][0]["loss"] = None
    (copy / "summary.json").write_text(json.dumps(summary))
    curve = load(copy).curve
    assert curve["metrics.version"][0] == 7.0
    assert curve["version"][0] == 0
    assert curve["f1"][0] == 0.5
    assert np.isnan(curve["f1"][1:]).all()
    assert np.isnan(curve["loss"][0])


def test_each_client_has_its_tasks_and_results(folder: Path) -> None:
    run = load(folder)
    clients = run.clients
    assert clients["used"].sum() == run.summary["results"]["used"]
    assert (clients["tasks"] >= clients["used"]).all()


def test_the_trace_has_each_message_with_its_outcome(folder: Path) -> None:
    run = load(folder)
    entries = list(run.trace)
    tasks = {each.number: each for each in entries if each.kind == "task"}
    used = [each for each in entries if each.outcome == "used"]
    assert len(used) == run.summary["results"]["used"]
    for each in used:
        assert tasks[each.answers].client == each.client
        assert each.staleness is not None
        assert each.nbytes > 0
        assert each.body["model_version"] == each.version
    assert [each.kind for each in entries[:1] + entries[-1:]] == ["opened", "ended"]
    assert run.trace.damage == ""


def test_a_rejected_message_has_its_code_and_reason(tmp_path: Path) -> None:
    story.write(tmp_path / "ledger")
    entries = {each.number: each for each in load(tmp_path).trace}
    rejected = [each for each in entries.values() if each.outcome == "rejected"]
    assert rejected
    for each in rejected:
        assert each.code
        assert each.reason
    refusals = [each for each in entries.values() if each.kind == "refusal" and each.answers]
    assert {each.answers for each in refusals} >= {each.number for each in rejected}


def test_a_damaged_ledger_is_an_error_that_says_what_to_do(copy: Path) -> None:
    (copy / "summary.json").unlink()
    segment = next((copy / "ledger").glob("messages-*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 255
    segment.write_bytes(data)
    with pytest.raises(LedgerDamage, match="fedmq ledger check"):
        _ = load(copy).summary
    trace = load(copy).trace
    assert list(trace)
    assert trace.damage


def test_the_configuration_starts_a_new_run(folder: Path) -> None:
    config = load(folder).config
    assert config.run.id == ""
    assert config.run.versions == load(folder).summary["versions"]


def test_one_of_several_runs_of_a_ledger(tmp_path: Path) -> None:
    for name in ("one", "two"):
        story.write(tmp_path / "ledger", name)
    with pytest.raises(ConfigError, match=r"\(one, two\), choose one with run_id"):
        _ = load(tmp_path).summary
    with pytest.raises(ConfigError, match="got 'three'"):
        _ = load(tmp_path, "three").summary
    assert load(tmp_path, "two").clients.rows == load(tmp_path, "one").clients.rows > 0
    assert len(list(load(tmp_path, "two").trace)) > 3


def test_the_model_is_a_state_dict(copy: Path) -> None:
    with pytest.raises(NodeError, match=r"has no model\.safetensors.*finished after \d+ versions"):
        load(copy).model()
    problem = Tiny()
    state = problem.model().state_dict()
    save_model(copy, state, problem, {"run": "r", "version": "3"})
    loaded = load(copy).model()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="has no ledger and no summary"):
            load(where)


def test_a_run_prints_what_it_came_to(folder: Path) -> None:
    text = repr(load(folder))
    assert text.startswith(f"<fedmq run {folder}: tests.sim.tally:Tally, rounds, finished, ")
    assert " results used, " in text


def test_the_curve_as_a_data_frame(folder: Path) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    run = load(folder)
    frame = run.to_pandas()
    assert list(frame.columns) == list(run.curve)
    assert frame["version"].tolist() == run.curve["version"].tolist()
    assert run.trace.to_pandas()["kind"].iloc[0] == "opened"
    assert len(run.clients.to_pandas()) == run.clients.rows


def test_without_pandas_one_sentence_says_what_to_install(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas.*pip install pandas"):
        Run(folder).to_pandas()


def test_columns_of_whole_numbers_texts_and_numbers_with_gaps() -> None:
    table = ArrayTable.of_rows([{"a": 1, "b": "x", "c": 1}, {"a": 2, "b": None}], "row", ("d",))
    assert {name: column.dtype.kind for name, column in table.items()} == {
        "d": "f",
        "a": "i",
        "b": "O",
        "c": "f",
    }
    assert np.isnan(table["d"]).all()
    assert repr(table) == "<2 rows: d, a, b, c>"
    assert ArrayTable.of_rows([], "row", ("a",)).rows == 0
