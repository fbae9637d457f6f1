"""``python -m mmkernels``: the same as the `mmkernels` command."""

from mmkernels.cli import main

main()
