"""Whether the rules are right: each claim about an operation, held against numbers.

``python -m fxgrow.labels.validate`` runs every operator on torch's own samples. The operands of a
call are labelled in every way a channel can enter; what the labels of operands and results then
say is a claim, and each is checked by running the operation on float64 numbers. A pin claims
nothing.

The idea is that of DTensor's ``torch/distributed/tensor/_ops/strategy_validation.py``, which proves
sharding rules by brute force over the same samples.
"""
