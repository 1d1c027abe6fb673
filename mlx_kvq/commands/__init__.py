"""The commands of ``mlx_kvq``, a file each."""
