"""What cache does with a store, on the CPU and on a GPU, by the names in its record."""

MODEL = "stories15m"
HIT, MISS = "hit", "miss"
EMPTY, SAME, ASKED = "nothing kept", "kept, same process", "asked whether it is kept"
OTHER, UPDATED = "kept, another process", "after an update of the weights"
OTHER_UPDATED = "after an update, another process"
AT_ONCE, DAMAGED, REPAIRED = "two processes at once", "a damaged entry", "after the damaged entry"
