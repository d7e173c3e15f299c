"""MOCHA: federated multi-task learning."""
