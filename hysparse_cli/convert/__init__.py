"""``hysparse convert``: headers in, a plan, streamed tensors, a checkpoint."""
