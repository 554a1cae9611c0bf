"""Find the fastest form and tiles of a model's forward on a GPU, by measuring, and keep them.

Only `tune` measures. An engine reads the store, and where that has nothing it takes the rule's form
and tiles (blocking.py).

    space.py    which tiles are worth timing
    descent.py  the walk through them, one kind of stage at a time
    search.py   what is timed in which order, and which form is chosen
    timer.py    microseconds of a forward, and kernels compiled several at a time
    facts.py    what a choice depends on: device, versions, sources
    store.py    what is kept
"""
