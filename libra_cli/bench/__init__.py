"""`libra bench`: what the routed layer costs beside the bare language model.

| module | holds |
|---|---|
| `settings` | sizes, the names of the figures and their bars; imports no torch |
| `models` | models with random weights, prompts |
| `naive` | the routed forward in the plainest form, as a baseline |
| `measure` | pairs of timings, bytes of a cache, and how they become one ratio |
| `memory` | peak memory of a prefill, in a process of its own |
| `counts` | the multiply-adds and bytes that no implementation saves |
| `figures` | one function a figure |
| `report` | machine, table, JSON |
"""
