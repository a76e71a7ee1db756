"""Runs in other projects' harnesses, each in a file of its own that needs the extra ``harness``."""
