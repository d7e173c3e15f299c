"""The live programs refuse the folder of a simulated run."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmq.nodes.cli.main import main
from fedmq.nodes.run.config import load
from fedmq.nodes.run_folder.folder import is_simulated, write_config


@pytest.mark.parametrize("command", ["broker", "aggregator"])
def test_a_live_node_refuses_the_folder_of_a_simulated_run(command: str, tmp_path: Path) -> None:
    config = load(None, ["run.id=r"])
    write_config(tmp_path, config, 0.0)
    assert not is_simulated(tmp_path)
    write_config(tmp_path, config, 0.0, simulated=True)
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(main, [command, "--run", str(tmp_path)])
    assert result.exit_code == 2
    assert f"--run: {tmp_path} has a simulated run" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
