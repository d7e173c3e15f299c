"""The console script ``fedmq``."""

from __future__ import annotations

from fedmq.nodes.process.ending import ending_well
from fedmq.nodes.process.parent import follow_parent


def main() -> None:
    """Run ``fedmq``; handle signals before anything else is imported."""
    with ending_well():
        follow_parent()
        from fedmq.nodes.cli.main import main as commands

        commands.main()
