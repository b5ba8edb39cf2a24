"""Chooses which layers stay full: strategies, what they measure, and the file that keeps it."""
