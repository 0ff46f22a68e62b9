"""The test bed: a small Llama trained on Python's standard library, and its recorded attention inputs.

`corpus` collects the text, `tasks` makes retrieval tasks of it, `model` defines the network and its files, `train`
trains it, `train_gate` distils SeerAttention gates for it, `evaluate` measures it, `record` writes samples.
"""
