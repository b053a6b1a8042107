"""`python -m pipelines` is the `perch` command, from whichever copy of the package is in the current folder.

A run's workspace holds a copy of this package, so a stage runs the code its run began with.
"""

from pipelines.cli.main import main

main()
