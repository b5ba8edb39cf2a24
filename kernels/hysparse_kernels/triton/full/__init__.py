"""Full attention with the selection of key blocks."""
