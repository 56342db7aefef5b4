"""The interactive HTML report of a run: archives in, one self-contained file out, or the same page live in TensorBoard.

`blocks` packs the numbers of snapshots, `contents` collects what a page shows of a run, `constants` what it draws with;
`page` and `bundle` build the page from the JavaScript and CSS in `web`; `report` writes the file; `server` answers the
live page.
"""
