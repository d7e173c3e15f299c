"""Federated Dropout: sub-models of fewer units."""
