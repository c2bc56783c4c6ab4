"""Reporting: from the event log of a run to numbers, pictures and pages.

The log is the only interface between running and reporting, so nothing here imports flwr, torch or any other folder of
this project.
Reading order: ``log`` (rows), ``curve`` and ``waiting`` (what is derived from them), ``summary`` (numbers), ``view``,
``timeline`` and ``figures`` (pictures), ``report`` and ``compare`` (pages), ``progress`` (the terminal).
"""
