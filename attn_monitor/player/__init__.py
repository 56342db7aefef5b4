"""A run as a page that one can ask: an archive in, one self-contained HTML file out, or the page live in TensorBoard.

`blocks` makes numbers of snapshots, `contents` gathers what a page shows of a run, `page` puts page and data together,
`report` writes the file; `web` holds the page itself, in JavaScript and CSS.
"""
