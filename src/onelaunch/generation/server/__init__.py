"""An HTTP server for one model: OpenAI's API, and what llama.cpp's server has besides.

- service.py: the model, its limits, and requests to sequences
- batcher.py: one thread that steps the engine's session; requests join and leave (continuous
  batching)
- requests.py: JSON bodies in, checked; responses.py: JSON and server-sent events out
- app.py: routes, middleware; run.py: sockets, signals
"""
