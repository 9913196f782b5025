"""Distillation: loss.py (with a teacher in memory)."""
