"""Measures a model beside its peers, dense and hybrid SWA: ``hysparse bench``.

run.py is the sweep; processes.py has a process for each subject, worker.py is what runs in it. Each
phase is a file: memory.py, prefill.py, decode.py, train.py; attention.py times the attention's part
of all of them, and work.py counts what they must do at the least. The attention ops by themselves
are timed by kernels/benchmarks, which a checkout has and the wheel has not.
"""
