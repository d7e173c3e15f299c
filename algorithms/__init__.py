"""Federated algorithms, their schedules and their problems."""
