"""Imports that all nodes of a local cluster share: the fork server runs them once."""

import fedmq.nodes.aggregator.program
import fedmq.nodes.worker.program  # noqa: F401
