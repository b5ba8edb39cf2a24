"""Carries out ``hysparse convert``: read the dense checkpoint, plan, decide, write."""
