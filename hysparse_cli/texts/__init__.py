"""Text to train, measure and evaluate on: read from files, or made up with planted facts."""
