"""llama.cpp's HTTP server, run by a Python that has xllamacpp; nothing of onelaunch is imported
here, so that it need not be installed there.

Run as `PYTHON llama_cpp_server.py GGUF SLOTS`. It prints its address, and serves until its standard
input ends.
"""

from __future__ import annotations

import os
import sys

import xllamacpp  # type: ignore[import-not-found, unused-ignore]

CONTEXT = 256  # of a slot
FREE_PORT = 0


def main() -> None:
    """Serve."""
    path, slots = sys.argv[1], int(sys.argv[2])
    # what llama.cpp prints goes nowhere: a full pipe would stop it
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = slots
    params.n_ctx = CONTEXT * slots
    params.port = FREE_PORT
    params.warmup = True
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    server = xllamacpp.Server(params)
    print(server.listening_address, file=out)
    sys.stdin.read()


if __name__ == "__main__":
    main()
