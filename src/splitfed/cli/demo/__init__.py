"""The demo: real digits, several owners, stateless replicas, and the same model trained in one place to compare with.

`data` reads the digits, `model` is what is cut, `recipe` what both runs share. `federated` trains over the owners,
`centralised` without them; `plots` draws both. `experiment` is a whole run and its files: `splitfed demo`.
"""
