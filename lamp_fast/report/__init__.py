"""``python -m lamp_fast.report RUN``: one self-contained HTML page about a run."""
