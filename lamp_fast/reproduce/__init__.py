"""The paper's tables and figures, each from one command: ``python -m lamp_fast.reproduce TABLE``.

layout.py      what a table is made of: rows, columns, metrics
tables.py      the paper's tables
long_tail.py   the long-tail field's table
jobs.py        a run or a score, as a job of lamp_fast/jobs
attempt.py     one job, in a process of its own
results.py     jobs' outcomes as the cells of a table
paper.py       the paper's and others' figures, with what is odd in them
render.py      Markdown, LaTeX, CSV, JSON and pictures
theorem.py     Theorem A.2, certified and drawn
"""
