"""The sliding window branch, and the gated sum of both."""
