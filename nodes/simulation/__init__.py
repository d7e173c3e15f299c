"""Simulation of whole runs in virtual time."""
