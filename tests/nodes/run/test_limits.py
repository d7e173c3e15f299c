"""``[broker.limits]`` and ``--limit``: each limit is checked, and errors name it."""

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmq.broker.settings import BrokerSettings, InvalidLimit, Limits
from fedmq.nodes.cli.main import main
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import build, load, parse

ROOT = Path(__file__).parents[3]
NAMES = [each.name for each in fields(Limits)]


def test_limits_reach_the_brokers_settings() -> None:
    settings = load(None, ["broker.limits.nodes=7", "broker.limits.held_bytes=8e6"])
    assert settings.broker.settings() == BrokerSettings(
        limits=Limits(nodes=7, held_bytes=8_000_000)
    )
    assert parse(settings.to_toml()).broker == settings.broker
    assert build({}).broker.settings() == BrokerSettings()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_limit_is_above_zero(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^broker\.limits\.{name}: expected a finite number ab"):
        load(None, [f"broker.limits.{name}={value}"])
    with pytest.raises(InvalidLimit) as caught:
        Limits(**{name: int(value)})
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            {"node": 3},
            "unknown key 'broker.limits.node' (did you mean 'nodes'?); choose from runs,",
        ),
        ({"nodes": "x"}, "broker.limits.nodes: expected a whole number, got 'x'"),
        ({"nodes": True}, "broker.limits.nodes: expected a number, got true"),
        (5, "broker.limits: expected a table, got 5"),
    ],
)
def test_a_wrong_limit_is_one_sentence(limits: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"broker": {"limits": limits}})
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("nodes", "--limit nodes: expected NAME=VALUE, such as nodes=1000"),
        ("nodes.x=3", "--limit nodes.x=3: expected the name of a limit without a dot"),
        ("nodes=0", "broker.limits.nodes: expected a finite number above 0, got 0"),
        ("noodles=1", "unknown key 'broker.limits.noodles'"),
    ],
)
def test_the_option_of_the_broker(tmp_path: Path, option: str, words: str) -> None:
    result = CliRunner().invoke(main, ["broker", "--run", str(tmp_path), "--limit", option])
    assert result.exit_code == 2
    assert words in result.output


def test_the_docs_list_each_limit() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    table = page[page.index("## Limits") :]
    assert [name for name in NAMES if f"`{name}`" not in table] == []
