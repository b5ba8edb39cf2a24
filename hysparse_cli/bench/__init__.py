"""``hysparse bench``: what a checkpoint's cache holds and how fast it runs, beside others."""
