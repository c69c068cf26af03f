"""Attacks on the package: generators of hostile input, and judges of what became of each case.

A case is a function of (attack, seed, number) alone, so each can be repeated. `serve` runs them in forked processes,
`client` starts it; `tests/test_reliability.py` runs a few of each attack, `runs/reliability.py` all of them.
"""
