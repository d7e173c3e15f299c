"""Federated Augmentation: distillation helped by a shared generator."""
