"""The test bed: a small Llama trained on Python's standard library, and its recorded attention inputs.

`corpus` collects the text, `model` defines the network and its files, `train` trains it, `evaluate` measures
it, `record` writes samples.
"""
