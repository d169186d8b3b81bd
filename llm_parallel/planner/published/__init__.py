"""Compares the planner with published measurements, and fits its constants to half of them."""
