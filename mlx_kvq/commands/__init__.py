"""The commands of ``mlx_kvq``, a file each, and the plugin for mlx-lm's own commands."""
