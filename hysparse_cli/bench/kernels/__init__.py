"""``hysparse bench kernels``: the ops of ``hysparse_kernels`` beside other people's, in one run."""
