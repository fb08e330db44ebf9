"""The demo: real digits, several owners, stateless replicas, and the same model in one place.

`data` reads the digits; `experiment` is the model, both runs and their files; `verb` is the command
`splitfed demo`.
"""
