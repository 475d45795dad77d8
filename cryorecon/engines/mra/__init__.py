"""Multireference alignment in one dimension: the problem and its solvers."""
