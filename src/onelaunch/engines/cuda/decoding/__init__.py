"""One more token of each growing sequence: a chain of kernels for few rows, captured as a graph.

A row is a sequence of the batch, its slot the place of its keys, values and state. What a row
computes does not depend on the others, nor on how many there are: every row has its own sums, in an
order that the tiles alone fix.
"""

STOP_IDS = 32
"""That end a sequence's text, at most."""
