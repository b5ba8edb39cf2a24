"""Measures, on the dense model, what a sparse layer starts from (``hysparse convert --init``)."""
