"""The comparison as a study: one file a question, and what they share.

  python -m experiments.study.plan                     what is run, and its cost
  python -m experiments.study.QUESTION --workdir=DIR   trains what is missing
  python -m experiments.study.report                   writes the report
  python -m experiments.study.demo --workdir=DIR       question 1, made small

A run is trained once, whichever question asks for it first, and leaves one
file in experiments/results/study/runs. The same command continues where it
stopped. The report is made of these files alone.
"""
