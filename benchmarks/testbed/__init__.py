"""The test bed: a small Llama trained on Python's standard library, and its recorded attention inputs.

`corpus` collects the text, `tasks` makes retrieval tasks of it, `model` defines the network and its files, `train`
trains it, `train_tasks` trains it further on `mixture` by `schedule`, in legs with a `checkpoint`, `train_gate` distils
SeerAttention gates for it, `tune_layers` tunes an alpha for each of its layers, `evaluate` and `answers` measure it,
`intervals` says how sure that is, `tokenizer` gives its tokens to programs that want text, `record` writes samples.
"""
