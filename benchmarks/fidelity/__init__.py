"""How right a model stays on sparse prefill: the test bed's model under every method, each over a sweep.

`methods` names what is compared and runs it inside the model, `plans` says over what, `items` makes what a stage asks,
`answering` scores tasks and text, `probing` measures densities, coverage and errors, `run` is the command, `join` makes
one result of those of a plan's shares, `findings` compares at equal density, `report` and `figure` turn a result into
words and pictures.
"""
