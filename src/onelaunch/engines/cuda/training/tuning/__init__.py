"""Find the fastest forms of a training step on a GPU, by measuring, and keep them.

Only `CudaTrainer.tune` measures. A trainer reads the store, and where that has nothing it takes the
rule's forms (../forms.py).

    candidates.py  which values of each form are worth timing
    search.py      the walk through them, one form at a time, without a device
    timer.py       micro-steps in two forms, as CUDA graphs, timed in turn
    store.py       what is kept, and forms as JSON data
"""
