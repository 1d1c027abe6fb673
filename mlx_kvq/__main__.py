"""``python -m mlx_kvq``, where the command is not on the path."""

from .cli import main

main()
