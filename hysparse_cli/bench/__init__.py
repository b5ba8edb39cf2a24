"""``hysparse bench``: a model beside its peers, dense and hybrid SWA, or the kernels alone.

run.py is the sweep; processes.py has a process for each subject, worker.py is what runs in it. Each
phase is a file: memory.py, prefill.py, decode.py, train.py; attention.py hears the attention's part
of all of them, and work.py counts what they must do at the least.
"""
