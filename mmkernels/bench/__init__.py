"""The benchmark: every op against its peers, side by side in one run, and against the floor of this very machine.

The cases, peers, costs and targets come from the cards (:mod:`mmkernels.cards`); nothing here names an op.
"""
