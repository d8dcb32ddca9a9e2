"""Measurements: named cases (cases.py), the stopwatch (run.py), tables (render.py)."""
