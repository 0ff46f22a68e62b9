"""`python -m benchmarks serving`: vLLM's engine under its own attention and under this library's plugin.

`answers` asks whether the engine says the same, token by token, and how often it is right; `ttft` how long it takes to
say something. Each contestant is an engine in a process of its own.
"""
