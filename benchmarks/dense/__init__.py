"""Detection and segmentation with a pretrained backbone under new layers: each part's norms, crossed.

`tasks` says what is trained and how it is measured, `norms` what a treatment puts where, `run` runs the grid, and
`report` writes the tables of docs/results.md.
"""
