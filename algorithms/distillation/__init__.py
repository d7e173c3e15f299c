"""Federated distillation and co-distillation."""
