"""The block-sparse branch, and decoding a whole sparse layer."""
