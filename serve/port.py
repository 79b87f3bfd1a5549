"""Whether this machine has a port free for the service; asked before long work, and again before the port is needed."""

import socket


def require_port(host: str, port: int) -> None:
    """ValueError unless `port` of `host`, a name or an address of either family, can be listened on."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on port {port} of {host} ({error.strerror}); choose another with --set serve.port=") from error
