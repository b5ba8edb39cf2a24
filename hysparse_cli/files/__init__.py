"""Reads checkpoints and other input with limits, and writes output that is whole or absent."""
