"""The networks, as functions of (weights, batch, cache), written for one device.

Shape letters used in every comment: T tokens (rows of a step), B sequences, H heads, D model width,
Q query latent, C key/value latent, R rope width, V vocabulary, F intermediate width, E experts,
K experts per token, L layers of a segment, N pages, S page size, P page-table width.
"""
