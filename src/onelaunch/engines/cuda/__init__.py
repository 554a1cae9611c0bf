"""A model on a GPU: stages in Triton, tiled as the plan says.

`pack` lays the weights out for the stages, `blocking` says how each is cut, `stages` holds their
tiles. `kernels` and `staged` run them one launch a stage; `fused`, `sync` and `one_launch` any
range of them in one; `watch`, `trace` and `timeline` tell when each tile of that ran.
`engines.choose` does not offer it yet; `onelaunch bench forward` runs it.
"""
