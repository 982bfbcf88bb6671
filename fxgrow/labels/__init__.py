"""Labels that flow through a network's real operations, one integer per channel.

Each axis of each parameter gets fresh integer labels, one per position. The network runs on meta
tensors under a dispatch mode; each tensor it computes carries *layers*: integer tensors of its own
shape that say which channel every element belongs to. Data movement moves the layers themselves,
pointwise operations unify the labels they bring together, and only operations that compute across
a dim need a rule. What is unified in the end carries one and the same channel.
"""
