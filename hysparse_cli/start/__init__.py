"""How a sparse layer starts (``hysparse convert --init``): measured on the dense model."""
