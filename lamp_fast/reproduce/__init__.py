"""The paper's tables and figures, each from one command: ``python -m lamp_fast.reproduce TABLE``.

tables.py      what each table is: rows, columns, seeds
jobs.py        a run or a score, and the address that says what it depends on
queue.py       a folder of jobs that workers on several machines share
attempt.py     one job, in a process of its own
cluster.py     workers through submitit
results.py     jobs' outcomes as the cells of a table
stats.py       mean, spread, and paired tests
paper.py       the paper's figures, with what is odd in them
render.py      Markdown, LaTeX, CSV, JSON and pictures
theorem.py     Theorem A.2, certified and drawn
"""
