"""A model on a GPU: stages in Triton, tiled as the plan says.

`pack` lays the weights out for the stages, `stages` holds the kernels, `staged` runs them, one
launch a stage. `engines.choose` does not offer it yet: it is held against the definition through
Triton's interpreter alone, and nothing of it was measured.
"""
