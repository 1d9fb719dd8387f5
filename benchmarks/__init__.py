"""Measurements that anybody can rerun. Each writes its raw numbers to benchmarks/results/."""
