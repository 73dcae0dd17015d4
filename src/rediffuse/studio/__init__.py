"""A local page on the runs of a root: draw, watch, cancel, edit, compare, and see runs train.

`asking` says what the fields of the page mean, `frames` walks and yields what is to be seen,
`shelf` reads runs, `showing` makes HTML of all that: plain functions, which need no browser. `desk`
keeps what outlives a click; `page` is the layout and its wires; `serve` opens it to this machine
alone. Only the last two import Gradio.
"""
