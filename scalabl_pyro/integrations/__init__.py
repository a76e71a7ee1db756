"""Runs in other projects' harnesses, which need the extra ``harness``, and the ELBO in the loop of
transformers; each in a file of its own."""
