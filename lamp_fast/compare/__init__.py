"""Which method for one's own pictures: ``python -m lamp_fast.compare --data folder --root DIR``.

settings.py    the flags
candidates.py  methods with the settings that they are tried with
cost.py        seconds that a method will take, and what fits into the time that there is
probe.py       a few steps of each method, timed on this machine
search.py      further settings of a method, which validation decides about
jobs.py        what the queue does: probes, fits without the test pictures, tests
attempt.py     one job, in a process of its own
work.py        the order of all that, within the budget; what is settled stays settled
comparing.py   from the flags to the folder
results.py     scores, intervals, paired tests and the choice
page.py        all of it on one HTML page
"""
