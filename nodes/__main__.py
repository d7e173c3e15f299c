"""``python -m fedmq.nodes``: what the command ``fedmq`` runs."""

from fedmq.nodes.cli.entry import main

if __name__ == "__main__":
    main()
