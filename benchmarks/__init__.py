"""How fast the operators and the renderer are: ``python -m benchmarks`` lists the cases.

A flat module per family of operators holds one function a case; `benchmarks.cases` lists them all.
No part of the package: it is neither installed nor imported by it.
"""

import dsd_fast  # noqa: F401  before torch, for the thread policy that every run of it has
