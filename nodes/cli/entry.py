"""The console script ``fedmq``."""

from __future__ import annotations

from fedmq.nodes.process.ending import ending_well


def main() -> None:
    """Run ``fedmq``; handle signals before anything else is imported."""
    with ending_well():
        from fedmq.nodes.cli.main import main as commands

        commands.main()
