"""Free ports for the processes that tests start."""

import random
import socket


def free_ports(count):
    """The first of ``count`` ports in a row that are free, below those that the system hands to
    whoever asks for any, the servers of other tests among them."""
    for port in random.sample(range(20000, 30000), 100):
        try:
            for i in range(count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + i))
        except OSError:
            continue
        return port
    raise RuntimeError("100 ports were taken")
