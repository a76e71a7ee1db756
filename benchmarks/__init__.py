"""Scripts that measure, run from the top of the repository.

python -m benchmarks.cost.train_step
"""
