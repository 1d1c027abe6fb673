"""The stored format: spec strings, rotations, the packed row, transforms, codes and scales.

The package's start-up hook imports ``format.spec``: this file imports nothing.
"""
